"""A turn of a session gives what the whole prompt gives without one: chains, branches, going back,
replacing what runs."""

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import InBackground, num_unfinished

from jaxengine import Engine

CHUNKS = ["The import statement", " A dictionary is", " In Python, a list", " The file object"]
GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}


@pytest.fixture
def session(text_engine: Engine) -> Iterator[str]:
    name = text_engine.open_session(0)
    assert name is not None
    yield name
    text_engine.close_session(name)


@pytest.fixture
def chunks(text_engine: Engine) -> list[list[int]]:
    return [text_engine.tokenizer.encode(chunk) for chunk in CHUNKS]


def rid_of(result: dict[str, Any]) -> str:
    return result["meta_info"]["id"]


def logprobs_of(result: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]


def test_a_chain_with_logprobs_equals_plain_requests(text_engine, session, chunks):
    """As SGLang's test of sessions does it: each turn drops the last token of the one before."""
    rid, before = None, []
    asked = dict(return_logprob=True, sampling_params=GREEDY)
    for ids in chunks:
        params = {"id": session, "rid": rid, "offset": -1, "replace": True}
        turn = text_engine.generate(input_ids=ids, session_params=params, **asked)
        plain = text_engine.generate(input_ids=before + ids, **asked)
        assert turn["output_ids"] == plain["output_ids"]
        assert turn["meta_info"]["prompt_tokens"] == len(before + ids)
        np.testing.assert_allclose(logprobs_of(turn), logprobs_of(plain), atol=1e-4)
        rid, before = rid_of(turn), before + ids + turn["output_ids"][:-1]


def test_branches_of_text_equal_plain_requests(text_engine, session):
    root = text_engine.generate(CHUNKS[0], GREEDY, session_params={"id": session})
    text = CHUNKS[0] + root["text"]
    for chunk in CHUNKS[1:3]:
        params = {"id": session, "rid": rid_of(root), "offset": 0, "replace": False}
        branch = text_engine.generate(chunk, GREEDY, session_params=params)
        params = {"id": session, "rid": rid_of(branch)}
        leaf = text_engine.generate(CHUNKS[3], GREEDY, session_params=params)
        assert branch["text"] == text_engine.generate(text + chunk, GREEDY)["text"]
        whole = text + chunk + branch["text"] + CHUNKS[3]
        assert leaf["text"] == text_engine.generate(whole, GREEDY)["text"]


def test_what_a_session_said_before_is_not_computed_again(text_engine, session, chunks):
    assert text_engine.flush_cache().success
    params = GREEDY | {"max_new_tokens": 60}
    first = text_engine.generate(
        input_ids=chunks[0], sampling_params=params, session_params={"id": session}
    )
    then = text_engine.generate(
        input_ids=chunks[1],
        sampling_params=params,
        session_params={"id": session, "rid": rid_of(first)},
    )
    page_size = text_engine.server_args.page_size
    known = len(chunks[0]) + 60 - 1  # the last token was drawn and never read
    assert first["meta_info"]["cached_tokens"] == 0
    assert then["meta_info"]["cached_tokens"] == known // page_size * page_size > 0


def test_going_back_makes_what_followed_unknown(text_engine, session):
    first = text_engine.generate(CHUNKS[0], GREEDY, session_params={"id": session})
    again = {"id": session, "rid": rid_of(first), "replace": True}
    then = text_engine.generate(CHUNKS[1], GREEDY, session_params=again)
    other = text_engine.generate(CHUNKS[2], GREEDY, session_params=again)
    whole = CHUNKS[0] + first["text"] + CHUNKS[2]
    assert other["text"] == text_engine.generate(whole, GREEDY)["text"]
    with pytest.raises(ValueError, match=f"has no turn '{rid_of(then)}'"):
        text_engine.generate("A", session_params={"id": session, "rid": rid_of(then)})


def test_replacing_a_running_turn_aborts_it_and_goes_on_from_what_there_is(text_engine, session):
    stream = text_engine.generate(CHUNKS[0], LONG, stream=True, session_params={"id": session})
    rid = rid_of(next(stream))
    with pytest.raises(ValueError, match=f"turn '{rid}' is unfinished"):
        text_engine.generate("A", session_params={"id": session, "rid": rid})
    params = {"id": session, "rid": rid, "offset": 6, "replace": True}
    second = text_engine.generate(CHUNKS[1], GREEDY, session_params=params)
    last = list(stream)[-1]
    reason = last["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and "another turn" in reason["message"]
    encode = text_engine.tokenizer.encode
    ids = (encode(CHUNKS[0]) + last["output_ids"])[:6] + encode(CHUNKS[1])
    assert (
        second["output_ids"]
        == text_engine.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"]
    )


def test_turns_that_are_replaced_while_they_run_end(text_engine, session):
    call = InBackground(
        text_engine, lambda: text_engine.generate("The", LONG, session_params={"id": session})
    )
    only = {"id": session, "replace": True}
    assert text_engine.generate(CHUNKS[0], GREEDY, session_params=only)["text"]
    assert call.join().result["meta_info"]["finish_reason"]["type"] == "abort"


def test_samples_and_lists_are_branches(text_engine, session):
    first = text_engine.generate(CHUNKS[0], GREEDY, session_params={"id": session})
    params = {"id": session, "rid": rid_of(first)}
    samples = text_engine.generate(CHUNKS[1:3], GREEDY | {"n": 2}, rid="b", session_params=params)
    whole = [CHUNKS[0] + first["text"] + chunk for chunk in CHUNKS[1:3] for _ in range(2)]
    plain = text_engine.generate(whole, GREEDY)
    assert [each["text"] for each in samples] == [each["text"] for each in plain]
    leaf = text_engine.generate("A", GREEDY, session_params={"id": session, "rid": "b_1_0"})
    expected = text_engine.generate(whole[2] + samples[2]["text"] + "A", GREEDY)
    assert leaf["text"] == expected["text"]


def test_a_streaming_session_appends_turn_by_turn(text_engine):
    session = text_engine.open_session(1000, "voice", streaming=True, timeout=60)
    assert session == "voice"
    text = ""
    for chunk in CHUNKS[:3]:
        turn = text_engine.generate(chunk, GREEDY, session_params={"id": session})
        text += chunk
        assert turn["text"] == text_engine.generate(text, GREEDY)["text"]
        text += turn["text"]
    stream = text_engine.generate("The", LONG, stream=True, session_params={"id": session})
    next(stream)
    with pytest.raises(ValueError, match="has an unfinished turn"):
        text_engine.generate("A", session_params={"id": session})
    stream.close()
    assert num_unfinished(text_engine) == 0
    turn = text_engine.generate(CHUNKS[3], GREEDY, session_params={"id": session})
    assert turn["text"] == text_engine.generate(text + CHUNKS[3], GREEDY)["text"], "abort undone"
    text_engine.close_session(session)


def test_coroutines_have_sessions_too(text_engine, session):
    async def main() -> tuple[str, str]:
        first = await text_engine.async_generate(CHUNKS[0], GREEDY, session_params={"id": session})
        params = {"id": session, "rid": rid_of(first)}
        chunks = await text_engine.async_generate(
            CHUNKS[1], GREEDY, stream=True, session_params=params
        )
        async for chunk in chunks:
            text = chunk["text"]
        return first["text"], text

    first, then = asyncio.run(main())
    assert then == text_engine.generate(CHUNKS[0] + first + CHUNKS[1], GREEDY)["text"]


def test_a_turn_that_the_engine_refuses_is_none(text_engine):
    session = text_engine.open_session(0, streaming=True)
    stream = text_engine.generate("The", LONG, stream=True, rid="taken")
    next(stream)
    for make in (text_engine.generate, text_engine.async_generate):
        with pytest.raises(ValueError, match="rid 'taken' is in use"):
            answer = make("A", GREEDY, rid="taken", session_params={"id": session})
            asyncio.run(answer)
    stream.close()
    turn = text_engine.generate("A", GREEDY, rid="taken", session_params={"id": session})
    assert turn["meta_info"]["prompt_tokens"] == len(text_engine.tokenizer.encode("A"))
    text_engine.close_session(session)


def test_limits_are_those_of_the_whole_prompt(text_engine, session, chunks):
    turn = text_engine.generate(CHUNKS[0], LONG, session_params={"id": session})
    params = {"id": session, "rid": rid_of(turn)}
    with pytest.raises(ValueError, match="new ones do not fit"):
        text_engine.generate(CHUNKS[1], LONG, session_params=params)
    with pytest.raises(ValueError, match="logprob_start_len: expected less than the prompt's"):
        text_engine.generate(
            CHUNKS[1], GREEDY, return_logprob=True, logprob_start_len=500, session_params=params
        )


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"id": "nowhere"}, ValueError, "no open session 'nowhere'"),
        ({"id": "s", "rid": "never"}, ValueError, "has no turn 'never'"),
        ({"id": "s", "offset": "1"}, ValueError, "offset: expected int"),
        ({"session": "s"}, TypeError, "unexpected 'session'"),
        ("s", TypeError, "session_params: expected a dict, got 's'"),
    ],
)
def test_mistakes_are_named(text_engine, params, error, message):
    text_engine.open_session(0, "s")
    with pytest.raises(error, match=message):
        text_engine.generate("A", session_params=params)
    text_engine.close_session("s")


def test_no_session_is_the_default(text_engine):
    for params in (None, {}):
        assert text_engine.generate("A", GREEDY, session_params=params)["text"]


def test_the_name_of_a_conversation_alone_changes_nothing(text_engine):
    with pytest.warns(UserWarning, match="session_id is ignored: .* pass session_params"):
        named = text_engine.generate("A", GREEDY, session_id="s")
    assert named["text"] == text_engine.generate("A", GREEDY)["text"]


def test_an_idle_session_closes_itself(text_engine):
    session = text_engine.open_session(0, timeout=1.0)
    text_engine.generate("A", GREEDY, session_params={"id": session})
    time.sleep(1.2)
    with pytest.raises(ValueError, match="no open session"):
        text_engine.generate("A", GREEDY, session_params={"id": session})


def test_a_session_does_not_keep_a_forgotten_engine(make_engine):
    engine = make_engine()
    engine.open_session(0, "s")
    engine.generate(input_ids=[1], sampling_params=GREEDY, session_params={"id": "s"})
    loop = engine._loop
    del engine
    gc.collect()
    assert not loop.is_alive
