"""Entries become requests that are sure to fit, or errors that name the field and the way out."""

import random
import re
from array import array
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.admission import Limits, make_request
from jaxengine.inputs import Entry
from jaxengine.request import Request
from jaxengine.sampling_params import SamplingParams

VOCAB, EOS = 100, 9


def limits(
    context: int = 64, pool: int = 1000, truncates: bool = False, generates: bool = True
) -> Limits:
    return Limits(
        vocab_size=VOCAB,
        num_layers=2,
        context_length=context,
        pool_tokens=pool,
        eos_token_ids=frozenset({EOS}),
        truncates=truncates,
        generates=generates,
    )


def made(
    ids: Any = (1, 2, 3), of: Limits | None = None, *, text: str | None = None, sample: int = 0,
    **sampling: Any,
) -> Request:  # fmt: skip
    entry = Entry(
        text, None if text is not None else ids, SamplingParams(**sampling), "r", 7, sample
    )
    return make_request(entry, ids, of or limits(), random.Random(0))


def test_a_request_carries_what_was_asked():
    request = made([1, 2, 3], max_new_tokens=5, stop_token_ids=[4], sampling_seed=6)
    assert (request.rid, list(request.prompt_ids), request.priority) == ("r", [1, 2, 3], 7)
    assert (request.max_new_tokens, request.seed) == (5, 6)
    assert request.stop_token_ids == {4, EOS}


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(1), 2],
        (np.uint8(1), np.int32(2)),
        [jnp.array(1), 2],
        [1, re.IGNORECASE],
        array("I", [1, 2]),
    ],
)
def test_ids_become_pythons_own_numbers(ids):
    prompt_ids = list(made(ids).prompt_ids)
    assert prompt_ids == [1, 2] and {type(token) for token in prompt_ids} == {int}
    with pytest.raises(ValueError, match="got 1.5 at index 2"):
        made([*ids, np.float32(1.5)])


def test_without_stop_tokens_only_the_models_own_end_it():
    assert made().stop_token_ids == {EOS}
    assert made(ignore_eos=True, stop_token_ids=[4]).stop_token_ids == frozenset()


@pytest.mark.parametrize("length", [1, 2, 62, 63])
def test_what_fits_is_taken_to_the_last_token(length):
    assert made([1] * length).max_new_tokens == 64 - length  # the default is cut
    assert made([1] * length, max_new_tokens=None).max_new_tokens == 64 - length
    assert made([1] * length, max_new_tokens=64 - length).max_new_tokens == 64 - length
    with pytest.raises(ValueError, match="^max_new_tokens: .* the context of 64 tokens"):
        made([1] * length, max_new_tokens=65 - length)


def test_the_default_length_is_that_of_sglang():
    assert made(of=limits(context=1000)).max_new_tokens == 128


def test_the_default_written_out_is_a_wish_like_any_other():
    with pytest.raises(ValueError, match="^max_new_tokens: 1 prompt tokens and 128 new ones"):
        made([1], max_new_tokens=128)


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_without_room_for_an_answer_is_refused(length):
    with pytest.raises(ValueError, match=f"^input_ids: {length} tokens.* raise context_length"):
        made([1] * length, max_new_tokens=0)


def test_where_the_pool_is_smaller_it_is_the_limit():
    assert made([1] * 31, limits(pool=32), max_new_tokens=None).max_new_tokens == 1
    with pytest.raises(ValueError, match="KV pool of 32 tokens; .* raise max_total_tokens"):
        made([1] * 32, limits(pool=32))


def test_too_much_is_cut_where_that_was_asked_for():
    with pytest.warns(UserWarning, match="a prompt of 70 tokens was cut to 63"):
        request = made(list(range(70)), limits(truncates=True), max_new_tokens=5)
    assert list(request.prompt_ids) == list(range(63)) and request.max_new_tokens == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "input_ids: expected at least one token, got an empty prompt"),
        ([1, VOCAB], "input_ids: expected token ids from 0 to 99, got 100 at index 1"),
        ([1, -1], "got -1 at index 1"),
        ([1, 2**70], "at index 1"),
        ([2**32 + 1], "got 4294967297 at index 0"),
        ([True], "got True at index 0"),
        ([1, np.True_], "got True at index 1"),
        ([5, 0, False], "got False at index 2"),
        ([1.0], "got 1.0 at index 0"),
        ([float("nan")], "got nan at index 0"),
        (["1"], "got '1' at index 0"),
        ([None], "got None at index 0"),
        ([1, [2]], r"got \[2\] at index 1"),
    ],
)
def test_what_is_no_token_of_the_model_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        made(ids)


def test_an_empty_text_is_refused_by_its_name():
    with pytest.raises(ValueError, match="^prompt: expected at least one token"):
        made([], text="")


def test_a_tokenizer_of_another_model_is_told_from_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="^prompt: the tokenizer made the id 100 .*tokenizer_path"):
        made([1, 100], text="a")


@pytest.mark.parametrize("field", [{"stop_token_ids": [VOCAB]}, {"logit_bias": {VOCAB: 1.0}}])
def test_ids_in_parameters_are_checked_against_the_vocabulary(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))}: .* below the vocabulary size 100"):
        made(**field)


def test_without_a_seed_every_request_has_its_own():
    seeds = random.Random(0)
    entry = Entry(None, [1], SamplingParams(), "r", 0, 0)
    drawn = [make_request(entry, [1], limits(), seeds).seed for _ in range(100)]
    assert len(set(drawn)) == 100 and all(0 <= seed < 2**64 for seed in drawn)


def test_samples_of_a_seeded_prompt_differ_and_are_the_same_each_time():
    seeds = [made(sampling_seed=5, n=4, sample=sample).seed for sample in range(4)]
    assert seeds[0] == 5 and len(set(seeds)) == 4
    assert seeds == [made(sampling_seed=5, n=4, sample=sample).seed for sample in range(4)]
    assert made(sampling_seed=-1).seed == 2**64 - 1


def test_a_prompt_that_is_not_continued_may_fill_the_context():
    of = limits(generates=False)
    assert len(made([1] * 64, of, max_new_tokens=0).prompt_ids) == 64
    with pytest.raises(ValueError, match="input_ids: 65 tokens do not fit the context of 64"):
        made([1] * 65, of, max_new_tokens=0)
    with pytest.warns(UserWarning, match="65 tokens was cut to 64"):
        assert len(made([1] * 65, limits(truncates=True, generates=False)).prompt_ids) == 64
