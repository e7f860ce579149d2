"""Every rule of the sampling parameters: what is accepted, and how a mistake is named."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from jaxengine.sampling_params import GRAMMARS, UNAVAILABLE, GrammarSpec, SamplingParams
from jaxengine.sampling_values import (
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_STOP_REGEX_BYTES,
    MAX_STOP_REGEXES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

NAN, INF = float("nan"), float("inf")


def test_defaults_are_those_of_the_contract():
    params = SamplingParams()
    assert (params.max_new_tokens, params.min_new_tokens, params.n) == (128, 0, 1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, -1, 0.0)
    assert (params.frequency_penalty, params.presence_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert params.skip_special_tokens and params.spaces_between_special_tokens
    assert not params.ignore_eos and not params.no_stop_trim
    assert params.stop is params.stop_token_ids is params.stop_regex is None
    assert params.logit_bias is params.sampling_seed is params.stream_interval is None


def test_none_and_empty_dictionaries_are_the_defaults():
    assert SamplingParams.from_dict(None) == SamplingParams.from_dict({}) == SamplingParams()


def test_none_means_the_default_but_for_max_new_tokens():
    nones = {field.name: None for field in dataclasses.fields(SamplingParams)}
    assert SamplingParams.from_dict(nones) == SamplingParams(max_new_tokens=None)


def test_numbers_of_numpy_become_plain_ones():
    params = SamplingParams.from_dict(
        dict(temperature=np.float32(0.5), top_k=np.int64(7), stop_token_ids=[np.int32(3)], min_p=0)
    )
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 7, (3,))
    assert type(params.temperature) is type(params.min_p) is float and type(params.top_k) is int


def test_strings_become_tuples():
    params = SamplingParams(stop="a", stop_regex=["b+", "c"])
    assert params.stop == ("a",) and params.stop_regex == ("b+", "c")


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 1),
        ("min_p", 1.0),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("repetition_penalty", 2),
        ("max_new_tokens", 0),
        ("sampling_seed", -(2**63)),
        ("sampling_seed", 2**63 - 1),
        ("stop", []),
        ("logit_bias", {}),
        ("custom_params", {}),
        ("json_schema", "{}"),
        ("regex", "a" * MAX_GRAMMAR_BYTES["regex"]),
    ],
)
def test_values_at_the_limits_are_accepted(name, value):
    SamplingParams.from_dict({name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.1, 10**400, True, "0.5", [1.0], 1j])
def test_what_is_no_number_in_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number .*got "):
        SamplingParams.from_dict({name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", -2),
        ("top_k", 5.0),
        ("top_k", True),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("presence_penalty", NAN),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("n", 0),
        ("n", "2"),
        ("stream_interval", 0),
        ("sampling_seed", 2**63),
        ("sampling_seed", 1.0),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("no_stop_trim", 0),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", 5]),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
        ("stop_regex", "("),
        ("stop_regex", {"a": 1}),
        ("stop_regex", ["a"] * (MAX_STOP_REGEXES + 1)),
        ("stop_regex", "é" * (MAX_STOP_REGEX_BYTES // 2 + 1)),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", list(range(MAX_STOP_TOKEN_IDS + 1))),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"-1": 0.0}),
        ("logit_bias", {"x": 0.0}),
        ("logit_bias", {"9" * 5000: 0.0}),
        ("logit_bias", {1.0: 0.0}),
        ("logit_bias", {True: 0.0}),
        ("logit_bias", {1: NAN}),
        ("logit_bias", {1: "a"}),
        ("logit_bias", {1: 0.0, "1": 1.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("json_schema", 3),
        ("json_schema", ["object"]),
        ("json_schema", {"const": NAN}),
        ("json_schema", {"const": object()}),
        ("regex", b"a"),
        ("regex", {"a": 1}),
        ("regex", "\ud800"),
        ("ebnf", {"root": "a"}),
        *((name, "é" * (limit // 2 + 1)) for name, limit in MAX_GRAMMAR_BYTES.items()),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        SamplingParams.from_dict({name: value})


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_fields_without_a_feature_are_refused_not_ignored(name):
    with pytest.raises(ValueError, match=f"^{name}: .* not available yet"):
        SamplingParams.from_dict({name: 4})


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_form_of_the_completion_is_kept_as_text_and_an_empty_one_is_none(name):
    assert SamplingParams.from_dict({name: "text"}).grammar == GrammarSpec(name, "text")
    assert SamplingParams.from_dict({name: ""}) == SamplingParams()
    assert SamplingParams().grammar is None


@pytest.mark.parametrize("name", ["json_schema", "structural_tag"])
def test_a_dictionary_is_kept_as_json_in_its_own_order(name):
    params = SamplingParams.from_dict({name: {"b": {"é": None}, "a": [1]}})
    assert params.grammar == GrammarSpec(name, '{"b": {"\\u00e9": null}, "a": [1]}')
    assert SamplingParams(json_schema={}).grammar == GrammarSpec("json_schema", "{}")


@pytest.mark.parametrize("name", ["regex", "ebnf", "structural_tag"])
def test_two_forms_of_one_completion_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at most one .* json_schema and {name}"):
        SamplingParams.from_dict({"json_schema": "{}", name: "x"})


@pytest.mark.parametrize(
    "name, ours",
    [
        ("max_tokens", "max_new_tokens"),
        ("seed", "sampling_seed"),
        ("min_tokens", "min_new_tokens"),
        ("guided_json", "json_schema"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
    ],
)
def test_unknown_names_are_type_errors_that_suggest_ours(name, ours):
    with pytest.raises(TypeError, match=f"unknown parameter '{name}'; did you mean '{ours}'"):
        SamplingParams.from_dict({name: 1})


@pytest.mark.parametrize("name", ["logprobs", "length_penalty", "xyz", 5])
def test_unknown_names_without_a_likeness_list_what_exists(name):
    with pytest.raises(TypeError, match=f"unknown parameter {name!r}"):
        SamplingParams.from_dict({name: 1})


def test_what_is_no_dictionary_is_a_type_error():
    with pytest.raises(TypeError, match="expected a dict of parameters, got a list"):
        SamplingParams.from_dict([("n", 1)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name, value", [("stop_token_ids", [3, 320]), ("logit_bias", {"320": 1})])
def test_ids_beyond_the_vocabulary_are_refused_once_it_is_known(name, value):
    params = SamplingParams.from_dict({name: value})
    params.validate_for(321)
    with pytest.raises(ValueError, match=f"^{name}: expected token ids below .* 320, got 320"):
        params.validate_for(320)


def test_importing_the_parameters_loads_no_arrays():
    code = "import sys, jaxengine.sampling_params; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"jax", "numpy", "transformers"} & set(loaded.stdout.split())
