"""Completions of a form: what an engine generates under a grammar, whatever else is asked for."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest
from engines import SMALL, InBackground, check_books
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_grammar import SCHEMAS

import jaxengine

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


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(SCHEMAS, min_size=16, max_size=16))
def test_whatever_ends_is_what_its_schema_accepts(
    demo_engine: jaxengine.Engine, drawn: list[Any]
) -> None:
    """Few schemas: `test_grammar` has hundreds, without an engine."""
    params = [sampling(json_schema=schema, max_new_tokens=100) for schema in drawn]
    results = demo_engine.generate([PROMPTS[0]] * len(drawn), params)
    ended = 0
    for schema, result in zip(drawn, results, strict=True):
        if result["meta_info"]["finish_reason"]["type"] == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(result["text"]))
            ended += 1
    assert ended > 4
