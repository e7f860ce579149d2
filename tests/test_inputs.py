"""The arguments of a call become entries in order, or an error that names the argument."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.inputs import Inputs, normalise
from jaxengine.sampling_params import SamplingParams
from jaxengine.unavailable import UNAVAILABLE, refuse_unavailable


def normalised(
    prompt: Any = None,
    sampling_params: Any = None,
    input_ids: Any = None,
    rid: Any = None,
    priority: Any = None,
    defaults: Any = None,
) -> Inputs:
    return normalise(
        prompt, sampling_params, input_ids, rid=rid, priority=priority, defaults=defaults or {}
    )


def test_one_text_is_one_entry():
    [entry], is_batch = normalised("a")
    assert (entry.text, entry.input_ids, entry.sample, is_batch) == ("a", None, 0, False)
    assert entry.sampling == SamplingParams() and entry.priority == 0


@pytest.mark.parametrize("prompt", [["a"], ("a",)], ids=["list", "tuple"])
def test_a_list_of_one_is_a_list(prompt):
    entries, is_batch = normalised(prompt)
    assert [entry.text for entry in entries] == ["a"] and is_batch


def test_a_list_of_none_is_a_list():
    assert normalised([]) == Inputs([], True)


def test_samples_of_a_prompt_follow_one_another():
    entries, is_batch = normalised(["a", "b"], {"n": 2})
    assert [(entry.text, entry.sample) for entry in entries] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]
    assert is_batch and normalised("a", {"n": 2}).is_batch


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.uint16),
        jnp.array([1, 2]),
        [np.int64(1), np.int32(2)],
    ],
    ids=["list", "tuple", "numpy", "uint16", "jax", "numpy scalars"],
)
def test_ids_of_one_prompt(ids):
    [entry], is_batch = normalised(input_ids=ids)
    assert entry.input_ids is not None and entry.text is None
    assert list(entry.input_ids) == [1, 2] and not is_batch
    assert all(type(token) is int for token in entry.input_ids)


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2], [3]],
        ((1, 2), (3,)),
        [np.array([1, 2]), np.array([3])],
    ],
    ids=["lists", "tuples", "numpy"],
)
def test_ids_of_several_prompts(ids):
    entries, is_batch = normalised(input_ids=ids)
    assert [list(entry.input_ids or ()) for entry in entries] == [[1, 2], [3]] and is_batch
    assert all(type(token) is int for entry in entries for token in entry.input_ids or ())


def test_rows_of_an_array_are_prompts():
    entries, is_batch = normalised(input_ids=np.array([[1, 2], [3, 4]]))
    assert [entry.input_ids for entry in entries] == [[1, 2], [3, 4]] and is_batch


def test_an_empty_list_of_ids_is_one_empty_prompt():
    [entry], is_batch = normalised(input_ids=[])
    assert entry.input_ids == [] and not is_batch


def test_text_and_ids_of_the_same_prompts_may_both_be_given():
    entries, is_batch = normalised(["a", "b"], input_ids=[[1], [2]])
    assert [(entry.text, entry.input_ids) for entry in entries] == [("a", [1]), ("b", [2])]
    assert is_batch and normalised("a", input_ids=[1]).entries[0].input_ids == [1]


def test_one_dictionary_serves_all_and_a_list_one_each():
    shared = normalised(["a", "b"], {"top_k": 3}).entries
    own = normalised(["a", "b"], [{"top_k": 3}, SamplingParams(top_k=4)]).entries
    assert [entry.sampling.top_k for entry in shared] == [3, 3]
    assert [entry.sampling.top_k for entry in own] == [3, 4]


def test_dictionaries_that_are_equal_in_every_respect_are_checked_once():
    given = [{"top_k": 3}, {"top_k": 3}, {"top_k": 4}, {"stop": ["a"]}, {"stop": ["a"]}]
    one, same, other, *lists = (entry.sampling for entry in normalised(["a"] * 5, given).entries)
    assert one is same and (one.top_k, other.top_k) == (3, 4)
    assert [each.stop for each in lists] == [("a",), ("a",)]
    with pytest.raises(ValueError, match="prompt 1: n: expected an integer"):
        normalised(["a", "b"], [{"n": 1}, {"n": True}])  # equal, yet another thing


def test_defaults_lie_under_what_is_asked_for():
    defaults = {"temperature": 0.5, "top_k": 7}
    [entry] = normalised("a", {"top_k": 3}, defaults=defaults).entries
    assert (entry.sampling.temperature, entry.sampling.top_k) == (0.5, 3)
    assert normalised("a", defaults=defaults).entries[0].sampling.top_k == 7


def test_names_are_made_up_or_derived():
    made_up = [entry.rid for entry in normalised(["a", "b"], {"n": 2}).entries]
    assert len(set(made_up)) == 4
    given = lambda *args, **kwargs: [entry.rid for entry in normalised(*args, **kwargs).entries]
    assert given("a", rid="x") == ["x"]
    assert given(["a", "b"], rid="x") == ["x_0", "x_1"]
    assert given(["a", "b"], rid=["x", "y"]) == ["x", "y"]
    assert given("a", {"n": 2}, rid="x") == ["x_0", "x_1"]
    assert given(["a", "b"], {"n": 2}, rid=["x", "y"]) == ["x_0", "x_1", "y_0", "y_1"]


def test_priorities_are_shared_or_one_each():
    given = lambda priority: [
        entry.priority for entry in normalised(["a", "b"], priority=priority)[0]
    ]
    assert given(None) == [0, 0] and given(3) == [3, 3] and given([1, -2]) == [1, -2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: expected a prompt, or token ids as input_ids; got neither"),
        ({"prompt": 5}, "prompt: expected a string or a list of strings, got 5"),
        ({"prompt": b"a"}, "prompt: .* got b'a'"),
        ({"prompt": {"text": "a"}}, "prompt: .* got {'text': 'a'}"),
        ({"prompt": ["a", None]}, "prompt: expected strings, got None at index 1"),
        ({"prompt": [1, 2]}, "prompt: .* got 1 at index 0; pass token ids as input_ids"),
        ({"prompt": [[1, 2]]}, r"prompt: .* got \[1, 2\] at index 0; pass token ids as input_ids"),
        ({"prompt": [{"role": "user"}]}, "prompt: .* index 0; render a chat with tokenizer.apply_"),
        ({"input_ids": 5}, "input_ids: expected a list of token ids, or of such lists, got 5"),
        ({"input_ids": "12"}, "input_ids: expected a list .* got '12'"),
        ({"input_ids": {1, 2}}, "input_ids: expected a list"),
        ({"input_ids": np.array(5)}, "input_ids: expected a list"),
        ({"input_ids": [[1], 2]}, "input_ids: expected a list for every prompt, got 2 at index 1"),
        ({"input_ids": [[1], None]}, "input_ids: .* every prompt, got None at index 1"),
        ({"prompt": "a", "input_ids": [[1]]}, "input_ids: expected a single one .* a list of 1"),
        ({"prompt": ["a"], "input_ids": [1]}, "input_ids: expected a list of 1 .* a single one"),
        ({"prompt": ["a"], "input_ids": [[1], [2]]}, "input_ids: expected a list of 1 as"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "sampling_params: .* or 2, one per"),
        ({"prompt": "a", "sampling_params": [{}, {}]}, "sampling_params: .* or 1, one per prompt"),
        ({"prompt": ["a"] * 2, "sampling_params": [{}, {"top_p": 2}]}, "^prompt 1: top_p: "),
        ({"prompt": ["a"] * 2, "sampling_params": [{"n": 2}, {"n": 1}]}, r"^n: .*\[1, 2\]"),
        ({"prompt": "a", "rid": 5}, "rid: expected a string or a list of strings, got 5"),
        ({"prompt": "a", "rid": [5]}, r"rid: expected a string or a list of strings, got \[5\]"),
        ({"prompt": ["a"], "rid": ["x", "y"]}, "rid: expected 1 different strings"),
        ({"prompt": ["a"] * 2, "rid": ["x", "x"]}, "rid: expected 2 different strings"),
        ({"prompt": "a", "priority": 0.5}, "priority: expected an int, or 1 of them, got 0.5"),
        ({"prompt": "a", "priority": True}, "priority: expected an int"),
        ({"prompt": "a", "priority": ""}, "priority: expected an int"),
        ({"prompt": ["a"], "priority": [1, 2]}, "priority: expected an int, or 1 of them"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        normalised(**arguments)


@pytest.mark.parametrize(
    ("sampling_params", "message"),
    [
        ("temperature=0", "sampling_params: expected a dict .* got 'temperature=0'"),
        (5, "sampling_params: expected a dict or SamplingParams, got 5"),
        ({"max_tokens": 5}, "unknown parameter 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"temprature": 0}, "unknown parameter 'temprature'; did you mean 'temperature'"),
        ({5: 5}, "unknown parameter 5"),
        ([{"seed": 1}], "^prompt 0: .*did you mean 'sampling_seed'"),
    ],
)  # fmt: skip
def test_what_is_no_parameter_is_a_type_error(sampling_params, message):
    with pytest.raises(TypeError, match=message):
        normalised("a", sampling_params)


def test_messages_stay_short():
    with pytest.raises(ValueError) as caught:
        normalised(prompt=[["x" * 10**6]])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_what_is_unavailable_is_refused_and_its_defaults_are_not(name):
    for default in (None, False, 0, [], "", {}, [None, False], [[]]):
        refuse_unavailable({name: default})
    for value in (True, 1, [1], "a", [[1]], {"a": 1}, 0.5, np.zeros(2), object()):
        with pytest.raises(ValueError, match=f"^{name}: .* not available yet; leave it out"):
            refuse_unavailable({name: value})


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("temperature", r"it is a sampling parameter: sampling_params=\{'temperature': \.\.\.\}"),
        ("max_tokens", r"it is a sampling parameter: sampling_params=\{'max_new_tokens': \.\.\.\}"),
        ("prompts", "did you mean 'prompt'"),
        ("input_id", "did you mean 'input_ids'"),
        ("zzz", "expected some of prompt, sampling_params"),
    ],
)
def test_an_argument_that_does_not_exist_is_a_type_error_with_a_way_out(name, way_out):
    with pytest.raises(TypeError, match=f"unexpected argument '{name}'; {way_out}"):
        refuse_unavailable({name: None})
