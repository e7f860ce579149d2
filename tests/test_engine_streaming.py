"""Streams, aborts, names and refusals: what a call does to the requests of others, and to itself
when it ends early."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engines import num_unfinished

from jaxengine import Engine
from jaxengine.delivery import Stream

PROMPT = "The import statement"
PROMPTS = [PROMPT, "A dictionary is", "The file object", "In Python, a list", "An iterator"]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
LONG = {"temperature": 0, "max_new_tokens": 500, "ignore_eos": True}


def merged(chunks: Any) -> dict[int, dict[str, Any]]:
    """The last chunk of each index."""
    return {chunk["index"]: chunk for chunk in chunks}


# Streams


def test_a_stream_ends_with_what_generate_returns(text_engine):
    chunks = list(text_engine.generate(PROMPT, GREEDY, stream=True))
    whole = text_engine.generate(PROMPT, GREEDY)
    assert chunks[-1]["text"] == whole["text"] and chunks[-1]["output_ids"] == whole["output_ids"]
    texts = [chunk["text"] for chunk in chunks]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    reasons = [chunk["meta_info"]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == {"type": "length", "length": 12} and set(map(str, reasons[:-1])) == {
        "None"
    }
    assert not any("index" in chunk for chunk in chunks)
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(set(counts))


def test_chunks_of_a_list_carry_their_index(text_engine):
    last = merged(text_engine.generate(PROMPTS, GREEDY, stream=True))
    whole = text_engine.generate(PROMPTS, GREEDY)
    assert [last[i]["text"] for i in range(5)] == [result["text"] for result in whole]
    [only] = merged(text_engine.generate([PROMPT], GREEDY, stream=True))
    assert only == 0
    samples = merged(text_engine.generate("The", {"n": 3, "max_new_tokens": 4}, stream=True))
    assert sorted(samples) == [0, 1, 2]
    assert list(text_engine.generate([], stream=True)) == []


def test_the_interval_says_how_often(text_engine):
    params = GREEDY | {"max_new_tokens": 9, "stream_interval": 4}
    chunks = list(text_engine.generate(PROMPT, params, stream=True))
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert set(counts) <= {1, 5, 9} and counts[-1] == 9


def test_a_slow_reader_gets_the_newest_state(text_engine):
    stream = text_engine.generate(PROMPT, GREEDY, stream=True)
    text_engine.generate(PROMPT, GREEDY | {"max_new_tokens": 20})  # meanwhile the other one ends
    [chunk] = stream
    assert chunk["meta_info"]["completion_tokens"] == 12


def test_a_stream_of_no_tokens_has_its_last_chunk(text_engine):
    [chunk] = text_engine.generate(PROMPT, {"max_new_tokens": 0}, stream=True)
    assert chunk["text"] == "" and chunk["meta_info"]["finish_reason"]["type"] == "length"


def test_what_a_stop_string_may_begin_with_is_held_back(text_engine):
    free = text_engine.generate(PROMPT, GREEDY)["text"]
    start, end = 6, 22
    begun = [free[: start + n] for n in range(1, end - start + 1)]
    for stop, last in ((free[start:end] + "#", free), (free[start:end], free[:start])):
        stream = text_engine.generate(PROMPT, GREEDY | {"stop": stop}, stream=True)
        texts = [chunk["text"] for chunk in stream]
        assert texts[-1] == last and all(last.startswith(text) for text in texts)
        assert not set(texts) & set(begun), "it might have been the stop string"


def leave_by_closing(stream: Stream) -> None:
    stream.close()
    assert next(stream, None) is None


def leave_by_breaking(stream: Stream) -> None:
    for _ in stream:
        break


def leave_by_raising(stream: Stream) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_breaking, leave_by_raising])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPTS], ids=["single", "list"])
def test_a_stream_that_is_left_aborts_its_requests(
    text_engine: Engine, leave: Callable[[Stream], None], prompt: Any
):
    stream = text_engine.generate(prompt, LONG, stream=True)
    next(stream)
    assert num_unfinished(text_engine) > 0
    leave(stream)
    del stream
    gc.collect()
    assert num_unfinished(text_engine) == 0


def test_a_stream_may_be_read_on_another_thread(text_engine):
    stream, texts = text_engine.generate(PROMPT, GREEDY, stream=True), []
    reader = threading.Thread(target=lambda: texts.extend(chunk["text"] for chunk in stream))
    reader.start()
    reader.join()
    assert texts[-1] == text_engine.generate(PROMPT, GREEDY)["text"]


# Aborts and names


def test_an_abort_ends_the_named_and_leaves_the_others(text_engine):
    first = text_engine.generate(PROMPT, LONG, stream=True, rid="first")
    other = text_engine.generate(PROMPTS[1], LONG, stream=True, rid="other")
    next(first)
    next(other)
    text_engine.abort(["first", "unknown"])
    *_, last = first
    reason = last["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and "message" in reason and last["output_ids"]
    assert next(other)["meta_info"]["finish_reason"] is None
    text_engine.abort("other")
    assert [chunk["meta_info"]["finish_reason"]["type"] for chunk in other][-1] == "abort"


def test_an_aborted_call_returns_what_there_is(text_engine):
    results: list = []
    call = lambda: results.extend(text_engine.generate(PROMPTS, LONG, rid="many"))
    caller = threading.Thread(target=call)
    caller.start()
    while num_unfinished(text_engine) < len(PROMPTS):
        pass
    text_engine.abort(abort_all=True)
    caller.join()
    assert [result["meta_info"]["finish_reason"]["type"] for result in results] == ["abort"] * 5
    assert [result["meta_info"]["id"] for result in results] == [f"many_{i}" for i in range(5)]
    assert len(results[0]["output_ids"]) < 500


@pytest.mark.parametrize(
    "arguments", [{}, {"rid": "a", "abort_all": True}, {"rid": 5}, {"rid": ["a", 5]}]
)
def test_an_abort_of_nothing_in_particular_is_refused(text_engine, arguments):
    with pytest.raises(ValueError, match="^abort: expected"):
        text_engine.abort(**arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_in_use_is_refused_and_its_owner_unharmed(text_engine, stream):
    owner = text_engine.generate(PROMPT, LONG, stream=True, rid="mine")
    next(owner)
    with pytest.raises(ValueError, match="rid 'mine' is in use by an unfinished request"):
        text_engine.generate([PROMPT] * 2, GREEDY, rid=["new", "mine"], stream=stream)
    gc.collect()
    assert num_unfinished(text_engine) == 1, "neither the owner is aborted nor 'new' started"
    assert next(owner)["meta_info"]["finish_reason"] is None
    owner.close()
    assert text_engine.generate(PROMPT, GREEDY, rid="mine")["meta_info"]["id"] == "mine"


def test_the_cache_is_not_flushed_under_a_running_request(text_engine):
    stream = text_engine.generate(PROMPT, LONG, stream=True)
    next(stream)
    assert not text_engine.flush_cache().success
    stream.close()
    assert text_engine.flush_cache().success


def test_a_priority_without_effect_is_told(text_engine):
    with pytest.warns(UserWarning, match="priority: needs enable_priority_scheduling"):
        text_engine.generate(PROMPT, GREEDY, priority=1)


# Refusals


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(), ValueError, "prompt: expected a prompt"),
    (dict(prompt=""), ValueError, "prompt: expected at least one token"),
    (dict(prompt="a " * 5000), ValueError, "prompt: 5001 tokens, .*context of 512.* raise"),
    (dict(prompt=5), ValueError, "prompt: expected a string"),
    (dict(prompt="\ud800"), ValueError, "prompt: .* surrogate"),
    (dict(prompt=["a", ""]), ValueError, "^prompt 1: prompt: expected at least one token"),
    (dict(prompt=["a", "\ud800"]), ValueError, "^prompt 1: prompt: .* surrogate"),
    (dict(prompt=["a", 5]), ValueError, "at index 1"),
    (dict(input_ids=[]), ValueError, "input_ids: expected at least one token"),
    (dict(input_ids=[[1], []]), ValueError, "^prompt 1: input_ids: expected at least one token"),
    (dict(input_ids=[5, 4096]), ValueError, "input_ids: .* from 0 to 4095, got 4096 at index 1"),
    (dict(input_ids=[5, -1]), ValueError, "got -1 at index 1"),
    (dict(input_ids=[True]), ValueError, "got True at index 0"),
    (dict(input_ids=np.array([0.5])), ValueError, "got 0.5 at index 0"),
    (dict(input_ids=[[1], [1.0]]), ValueError, "^prompt 1: .* got 1.0 at index 0"),
    (dict(input_ids=5), ValueError, "input_ids: expected a list"),
    (dict(prompt="a", sampling_params={"temperature": float("nan")}), ValueError, "^temperature: "),
    (dict(prompt="a", sampling_params={"max_new_tokens": 600}), ValueError, "^max_new_tokens: "),
    (dict(prompt="a", sampling_params={"max_new_tokens": -1}), ValueError, "^max_new_tokens: "),
    (dict(prompt="a", sampling_params={"stop_token_ids": [4096]}), ValueError, "^stop_token_ids: "),
    (dict(prompt="a", sampling_params={"logit_bias": {4096: 1}}), ValueError, "^logit_bias: "),
    (dict(prompt="a", sampling_params={"stop_regex": "("}), ValueError, "^stop_regex: "),
    (dict(prompt="a", sampling_params={"max_tokens": 5}), TypeError, "did you mean 'max_new_tok"),
    (dict(prompt="a", sampling_params="greedy"), TypeError, "sampling_params: expected a dict"),
    (dict(prompt="a", sampling_params=[{}, {}]), ValueError, "sampling_params: expected one dict"),
    (dict(prompt=["a", "b"], sampling_params=[{}, {"n": 2}]), ValueError, "^n: "),
    (dict(prompt=["a"] * 2, sampling_params=[{}, {"top_k": 0}]), ValueError, "^prompt 1: top_k: "),
    (dict(prompt="a", rid=5), ValueError, "^rid: "),
    (dict(prompt="a", return_routed_experts=True), ValueError, "^return_routed.* leave it out"),
    (dict(prompt="a", image_data="x.png"), ValueError, "^image_data: .* leave it out"),
    (dict(prompt="a", temperature=0), TypeError, r"sampling_params=\{'temperature'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_CALLS)
def test_a_bad_call_is_refused_as_a_whole(text_engine, arguments, kind, message):
    before = text_engine.get_server_info()["num_steps"]
    with pytest.raises(kind, match=message):
        text_engine.generate(**arguments)
    assert num_unfinished(text_engine) == 0
    assert text_engine.get_server_info()["num_steps"] == before


def test_bad_calls_leave_the_calls_of_others_alone(text_engine):
    expected = text_engine.generate(PROMPT, GREEDY | {"max_new_tokens": 40})["text"]
    texts: list = []
    params = GREEDY | {"max_new_tokens": 40}
    other = threading.Thread(
        target=lambda: texts.append(text_engine.generate(PROMPT, params)["text"])
    )
    other.start()
    for arguments, kind, _ in BAD_CALLS:
        with pytest.raises(kind):
            text_engine.generate(**arguments)
    other.join()
    assert texts == [expected]


def test_arguments_of_what_is_unavailable_may_be_given_their_defaults(text_engine):
    result = text_engine.generate(
        PROMPT,
        GREEDY,
        return_logprob=False,
        logprob_start_len=-1,
        image_data=None,
        lora_path=[None],
    )
    assert result["text"]
