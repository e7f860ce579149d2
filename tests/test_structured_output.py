"""Completions of a form: what an engine generates under a grammar, whatever else is asked for."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from engines import SMALL, InBackground, check_books
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_grammar import SCHEMAS

import jaxengine
from jaxengine.sampling.masks import num_words
from jaxengine.sampling_params import GrammarSpec

PROMPTS = ["The import statement", "A dictionary is", "for", "A function definition"]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "size": {"enum": ["small", "large"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "size", "count"],
        "additionalProperties": False,
    }
)
FORMS: dict[str, Any] = {
    "json_schema": SCHEMA,
    "regex": r"(red|green) [0-9]{3}",
    "ebnf": 'root ::= "(" root ")" | "x"',
}


def fits(field: str, text: str) -> bool:
    if field == "json_schema":
        jsonschema.validate(json.loads(text), json.loads(SCHEMA))
        return True
    return bool(re.fullmatch({"regex": FORMS["regex"], "ebnf": r"\(*x\)*"}[field], text))


def sampling(**more: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "max_new_tokens": 200, "sampling_seed": 5, **more}


@pytest.fixture(params=["overlapped", "plain"], scope="module")
def engine(request: pytest.FixtureRequest):
    sizes: dict[str, Any] = SMALL | dict(
        disable_overlap_schedule=request.param == "plain",
        constrained_json_disable_any_whitespace=True,  # of which the model never tires
    )
    with jaxengine.Engine(**sizes) as engine:
        check_books(engine)
        yield engine


@pytest.mark.parametrize("field", FORMS)
def test_every_completion_is_of_its_form(engine: jaxengine.Engine, field: str) -> None:
    results = engine.generate(PROMPTS * 2, sampling(**{field: FORMS[field]}, n=2))
    for result in results:
        reason = result["meta_info"]["finish_reason"]
        assert reason["type"] == "stop", (result["text"], reason)
        assert reason["matched"] == result["output_ids"][-1]
        assert fits(field, result["text"]), result["text"]
    assert len({result["text"] for result in results}) > 1


def test_forms_mix_with_each_other_and_with_none(engine: jaxengine.Engine) -> None:
    """The unconstrained ones say what they say alone."""
    alone = engine.generate(PROMPTS[0], sampling(max_new_tokens=30))["text"]
    params = [sampling(max_new_tokens=30), *(sampling(**{f: FORMS[f]}) for f in FORMS)]
    first, *others = engine.generate([PROMPTS[0]] * 4, params)
    assert first["text"] == alone
    for field, result in zip(FORMS, others, strict=True):
        assert fits(field, result["text"])


def test_penalties_biases_filters_and_minima_do_not_break_a_form(engine: jaxengine.Engine) -> None:
    more: dict[str, Any] = dict(
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        top_p=0.9,
        top_k=3,
        logit_bias={"5": 100.0},
        min_new_tokens=150,
        stop="}",
        ignore_eos=True,
    )
    for result in engine.generate(PROMPTS, sampling(json_schema=SCHEMA, no_stop_trim=True, **more)):
        assert fits("json_schema", result["text"])


def test_log_probabilities_are_those_of_what_is_allowed(engine: jaxengine.Engine) -> None:
    result = engine.generate(
        PROMPTS[0], sampling(regex="[01]"), return_logprob=True, top_logprobs_num=4
    )
    told = result["meta_info"]
    assert len(told["output_token_logprobs"]) == len(result["output_ids"])
    for (logprob, token, _), top in zip(
        told["output_token_logprobs"], told["output_top_logprobs"], strict=True
    ):
        assert token in [each[1] for each in top] and logprob <= 0
        assert sum(2.718281828 ** each[0] for each in top) == pytest.approx(1, abs=1e-3)


def test_streams_and_coroutines(engine: jaxengine.Engine) -> None:
    chunks = list(engine.generate(PROMPTS[0], sampling(regex="[a-c]{20}"), stream=True))
    assert re.fullmatch("[a-c]{20}", chunks[-1]["text"]) and len(chunks) > 3

    async def two() -> list[Any]:
        calls = [engine.async_generate(PROMPTS[i], sampling(json_schema=SCHEMA)) for i in (0, 1)]
        return await asyncio.gather(*calls)

    for result in asyncio.run(two()):
        assert fits("json_schema", result["text"])


def test_a_form_longer_than_allowed_ends_by_its_length(engine: jaxengine.Engine) -> None:
    result = engine.generate(PROMPTS[0], sampling(regex="a{100,}", max_new_tokens=10))
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert set(result["text"]) == {"a"}


def test_a_bad_grammar_fails_its_own_call_alone(engine: jaxengine.Engine) -> None:
    beside = InBackground(engine, lambda: engine.generate(PROMPTS[1], sampling(max_new_tokens=60)))
    for field, text, message in (
        ("regex", "(a", "regex: "),
        ("json_schema", '{"type": "nonsense"}', "json_schema: "),
        ("ebnf", "root ::= nothing", "ebnf: "),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS[0], sampling(**{field: text}))
    with pytest.raises(ValueError, match="prompt 1: regex"):
        engine.generate(PROMPTS[:2], [sampling(), sampling(regex="(a")])
    assert len(beside.join().result["output_ids"]) > 0


def test_without_a_tokenizer_a_form_is_refused(make_engine: Any) -> None:
    with pytest.raises(ValueError, match="json_schema: structured output needs a tokenizer"):
        make_engine().generate(input_ids=[5, 6], sampling_params={"json_schema": "{}"})


LITERAL = '{"identifier of the thing": "none", "numbers": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "n": '
FORCED = {
    "at the beginning": (re.escape(LITERAL) + "[0-9]", LITERAL),
    "between": ("[xy]" + re.escape(LITERAL) + "[0-9]" + re.escape(LITERAL) + "z?", LITERAL),
}


def steps_of(engine: jaxengine.Engine, *prompt: Any, **more: Any) -> tuple[Any, int]:
    before = engine._loop.num_steps
    return engine.generate(*prompt, **more), engine._loop.num_steps - before


@pytest.mark.parametrize("where", FORCED)
def test_tokens_without_a_choice_take_few_steps(engine: jaxengine.Engine, where: str) -> None:
    regex, literal = FORCED[where]
    params = sampling(regex=regex, temperature=0.0)
    results, num_steps = steps_of(engine, PROMPTS, params)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert re.fullmatch(regex, result["text"]) and literal in result["text"]
        assert len(result["output_ids"]) > 4 * num_steps
        check_every_choice(engine, prompt, result, params)


def check_every_choice(engine: jaxengine.Engine, prompt: str, result: Any, params: Any) -> None:
    """Each token is the only one that may come, or the likeliest of those, as requests of one token
    tell it."""
    ids, prompt_ids = result["output_ids"], engine.tokenizer.encode(prompt)
    vocab_size = engine._started.limits.vocab_size
    matcher = (
        engine._started.grammars.compile(GrammarSpec("regex", params["regex"])).result().begin()
    )
    mask = np.zeros(num_words(vocab_size), np.int32)
    asked, forced = [], matcher.forced_tokens()
    for index, token in enumerate(ids):
        if forced:
            assert token == forced.pop(0)
        else:
            matcher.fill(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            asked.append((prompt_ids + ids[:index], allowed.tolist(), token))
        matcher.accept(token)
        forced = forced or matcher.forced_tokens()
    prompts, allowed, drawn = zip(*asked, strict=True)
    told = engine.generate(
        input_ids=list(prompts),
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        token_ids_logprob=list(allowed),
    )
    for each, token in zip(told, drawn, strict=True):
        [entries] = each["meta_info"]["output_token_ids_logprobs"]
        assert max(entries)[1] == token


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"max_new_tokens": 7}, {"type": "length", "length": 7}),
        ({"stop": "thing"}, {"type": "stop", "matched": "thing"}),
        ({"stop_regex": "3, 4"}, {"type": "stop", "matched": "3, 4"}),
    ],
)
@pytest.mark.parametrize("where", FORCED)
def test_a_completion_may_end_among_them(
    engine: jaxengine.Engine, where: str, more: Any, reason: Any
) -> None:
    regex, literal = FORCED[where]
    result = engine.generate(PROMPTS[0], sampling(regex=regex, **more))
    assert result["meta_info"]["finish_reason"] == reason
    shown = result["text"].lstrip("xy")
    assert shown and literal.startswith(shown)
    assert "stop" not in more or more["stop"] not in shown
    told = engine.generate(PROMPTS[0], sampling(regex=regex, **more), return_logprob=True)
    assert told["meta_info"]["finish_reason"] == reason


def test_what_is_told_or_remembered_of_each_token_is_of_each(engine: jaxengine.Engine) -> None:
    regex, _ = FORCED["between"]
    for asked in (dict(return_logprob=True), dict(return_hidden_states="last")):
        result, num_steps = steps_of(engine, PROMPTS[0], sampling(regex=regex), **asked)
        assert num_steps >= len(result["output_ids"])
    told = result["meta_info"]["hidden_states"]
    assert len(told) > 0


def test_a_stream_has_them_as_they_come(engine: jaxengine.Engine) -> None:
    regex, literal = FORCED["at the beginning"]
    chunks = list(engine.generate(PROMPTS[0], sampling(regex=regex), stream=True))
    assert chunks[0]["text"] == literal or literal.startswith(chunks[0]["text"])
    assert [len(each["output_ids"]) for each in chunks] == sorted(
        {len(each["output_ids"]) for each in chunks}
    )
    assert re.fullmatch(regex, chunks[-1]["text"])


def test_they_survive_a_pool_that_is_too_small(make_engine: Any) -> None:
    sizes: dict[str, Any] = SMALL | dict(max_total_tokens=256, schedule_conservativeness=0.0)
    with jaxengine.Engine(**sizes) as engine:
        check_books(engine)
        regex, _ = FORCED["between"]
        params = sampling(regex=regex, temperature=0.0)
        together = engine.generate(PROMPTS * 4, params)
        alone = [engine.generate(prompt, params)["output_ids"] for prompt in PROMPTS]
        assert [result["output_ids"] for result in together] == alone * 4
        assert sum(result["meta_info"]["total_retractions"] for result in together) > 0


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(SCHEMAS, min_size=16, max_size=16, unique_by=str))
def test_whatever_ends_is_what_its_schema_accepts(
    engine: jaxengine.Engine, drawn: list[Any]
) -> None:
    """Few schemas: `test_grammar` has hundreds, without an engine."""
    [quote] = engine.tokenizer.encode('"')  # nothing else would make this model end a string
    more: dict[str, Any] = dict(max_new_tokens=100, logit_bias={str(quote): 5.0})
    params = [sampling(json_schema=schema, **more) for schema in drawn]
    results = engine.generate([PROMPTS[0]] * len(drawn), params)
    ended = 0
    for schema, result in zip(drawn, results, strict=True):
        if result["meta_info"]["finish_reason"]["type"] == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(result["text"]))
            ended += 1
    assert ended > 4
