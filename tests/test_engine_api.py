"""What `generate` gives back: its lists and dictionaries, its reasons to stop, and what each
parameter does to a real model."""

import re
import time
from typing import Any

import numpy as np
import pytest
from engines import SMALL

from jaxengine import Engine, SamplingParams

PROMPT = "The import statement"
PROMPTS = [PROMPT, "A dictionary is", "The file object", "In Python, a list", "An iterator"]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
EOS = 0


def greedy(engine: Engine, prompt: Any = PROMPT, **params: Any) -> Any:
    return engine.generate(prompt, GREEDY | params)


def test_a_string_gives_a_dictionary_and_a_list_a_list(text_engine):
    assert isinstance(greedy(text_engine), dict)
    [only] = greedy(text_engine, [PROMPT])
    assert only["text"] == greedy(text_engine)["text"]
    assert greedy(text_engine, []) == []


def test_results_have_the_order_of_the_prompts_whatever_their_lengths(text_engine):
    params = [{"temperature": 0, "max_new_tokens": 1 + 5 * (i % 3)} for i in range(5)]
    results = text_engine.generate(PROMPTS, params)
    alone = [text_engine.generate(*pair) for pair in zip(PROMPTS, params, strict=True)]
    assert [result["text"] for result in results] == [result["text"] for result in alone]
    assert not any("index" in result for result in results)


def test_samples_of_a_prompt_are_a_flat_list(text_engine):
    params = {"n": 3, "max_new_tokens": 8, "sampling_seed": 1}
    of_one = text_engine.generate("The", params)
    texts = [result["text"] for result in text_engine.generate(["The", "A"], params)]
    assert len(set(texts)) == 6 and texts[:3] == [result["text"] for result in of_one]


def test_a_group_runs_at_once_or_not_at_all(text_engine):
    params = GREEDY | {"group": "together"}
    expected = greedy(text_engine, PROMPTS[:3])
    together = text_engine.generate(PROMPTS[:3], params | {"n": 2})
    assert [each["text"] for each in together[::2]] == [each["text"] for each in expected]
    with pytest.raises(ValueError, match="group: 5 requests .* max_running_requests = 4"):
        text_engine.generate(PROMPTS, params)
    with pytest.raises(ValueError, match="group: expected a name or a number"):
        text_engine.generate(PROMPTS, GREEDY | {"group": ["a"]})


def test_a_result_has_these_keys_and_no_others(text_engine):
    before = time.time()
    result = text_engine.generate(PROMPT, GREEDY, rid="mine")
    meta_info = result.pop("meta_info")
    assert result.keys() == {"text", "output_ids"}
    assert 0 < meta_info.pop("e2e_latency") < 100
    assert before <= meta_info.pop("response_sent_to_client_ts") <= time.time()
    assert meta_info == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 12},
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "cached_tokens": 0,
        "weight_version": "default",
        "total_retractions": 0,
    }
    assert len(result["output_ids"]) == 12 and all(type(i) is int for i in result["output_ids"])
    assert result["text"] == text_engine.tokenizer.decode(result["output_ids"])


def test_greedy_text_is_always_the_same(text_engine):
    texts = {greedy(text_engine)["text"] for _ in range(3)}
    texts |= {result["text"] for result in greedy(text_engine, [PROMPT] * 6)}
    assert len(texts) == 1


def test_parameters_may_be_an_object(text_engine):
    params = SamplingParams(temperature=0, max_new_tokens=12)
    assert text_engine.generate(PROMPT, params)["text"] == greedy(text_engine)["text"]
    assert len(text_engine.generate([PROMPT], [params])) == 1


@pytest.mark.parametrize("make", [list, tuple, np.asarray], ids=["list", "tuple", "array"])
def test_token_ids_do_as_well_as_text(text_engine, make):
    ids = text_engine.tokenizer.encode(PROMPT)
    result = text_engine.generate(input_ids=make(ids), sampling_params=GREEDY)
    assert result["text"] == greedy(text_engine)["text"]
    both = text_engine.generate("something else", GREEDY, input_ids=[make(ids)][0])
    assert both["output_ids"] == result["output_ids"], "ids win over text"
    assert len(text_engine.generate(input_ids=[make(ids)], sampling_params=GREEDY)) == 1


# Reasons to stop


def test_the_end_token_stops_is_counted_and_is_not_shown(text_engine):
    result = greedy(text_engine, logit_bias={EOS: 100.0})
    assert result["output_ids"] == [EOS] and result["text"] == ""
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert result["meta_info"]["completion_tokens"] == 1


def test_the_end_may_be_ignored_and_then_stop_tokens_are_too(text_engine):
    result = greedy(text_engine, logit_bias={EOS: 100.0}, ignore_eos=True, stop_token_ids=[EOS])
    assert result["output_ids"] == [EOS] * 12 and result["text"] == ""
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 12}


def test_special_tokens_are_shown_on_demand(text_engine):
    params: dict = dict(logit_bias={2: 100.0}, ignore_eos=True, max_new_tokens=2)
    assert greedy(text_engine, **params)["text"] == ""
    shown = greedy(text_engine, **params, skip_special_tokens=False)["text"]
    assert shown == "<|im_end|>" * 2


def test_the_least_number_of_tokens_comes_before_any_end(text_engine):
    result = greedy(text_engine, logit_bias={EOS: 100.0}, min_new_tokens=5)
    assert len(result["output_ids"]) == 6 and result["output_ids"].index(EOS) == 5


def test_an_end_in_the_last_place_is_an_end(text_engine):
    result = greedy(text_engine, logit_bias={EOS: 100.0}, max_new_tokens=1)
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}


def test_a_stop_token_stops(text_engine):
    free = greedy(text_engine)
    token = free["output_ids"][4]
    result = greedy(text_engine, stop_token_ids=[token])
    assert result["output_ids"] == free["output_ids"][:5]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert result["text"] == text_engine.tokenizer.decode(free["output_ids"][:4])
    kept = greedy(text_engine, stop_token_ids=[token], no_stop_trim=True)
    assert kept["text"] == text_engine.tokenizer.decode(free["output_ids"][:5])


@pytest.mark.parametrize(
    ("make_params", "shows_it"),
    [
        (lambda stop: {"stop": stop}, False),
        (lambda stop: {"stop": ["zzz", stop]}, False),
        (lambda stop: {"stop": stop, "no_stop_trim": True}, True),
        (lambda stop: {"stop_regex": re.escape(stop[:2]) + ".{4}" + re.escape(stop[-2:])}, True),
        (lambda stop: {"stop": stop, "stop_regex": re.escape(stop) + ".{60}"}, False),
        (lambda stop: {"stop": stop, "ignore_eos": True}, False),
    ],
    ids=["string", "one of two", "untrimmed", "expression", "string first", "no end"],
)
def test_stop_strings_and_expressions(text_engine, make_params, shows_it):
    free = greedy(text_engine)
    stop = text_engine.tokenizer.decode(free["output_ids"][:4])[-8:]  # ends where a token does
    params = make_params(stop)
    result = greedy(text_engine, **params)
    reason = result["meta_info"]["finish_reason"]
    assert reason == {"type": "stop", "matched": stop if "stop" in params else params["stop_regex"]}
    assert result["text"] == free["text"][: free["text"].index(stop) + shows_it * len(stop)]
    assert result["meta_info"]["completion_tokens"] == len(result["output_ids"]) < 12
    assert free["output_ids"][: len(result["output_ids"])] == result["output_ids"]


def test_a_stop_string_that_does_not_come_changes_nothing(text_engine):
    free = greedy(text_engine)["text"]
    assert greedy(text_engine, stop=free[-8:] + "#")["text"] == free


# How much


def test_no_new_token_at_all(text_engine):
    result = greedy(text_engine, max_new_tokens=0)
    assert result["text"] == "" and result["output_ids"] == []
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert result["meta_info"]["completion_tokens"] == 0


def test_no_limit_means_up_to_the_end_of_the_context(text_engine):
    ids = [300] * (SMALL["context_length"] - 5)
    for params in ({"max_new_tokens": None}, {}):
        result = text_engine.generate(input_ids=ids, sampling_params={"ignore_eos": True, **params})
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 5}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 509])
def test_prompts_of_hostile_lengths(text_engine, length):
    ids = [(7 * i) % 4000 for i in range(length)]
    result = text_engine.generate(input_ids=ids, sampling_params=GREEDY | {"max_new_tokens": 2})
    assert result["meta_info"]["prompt_tokens"] == length and len(result["output_ids"]) == 2
    again = text_engine.generate(input_ids=ids, sampling_params=GREEDY | {"max_new_tokens": 2})
    assert again["output_ids"] == result["output_ids"]
    assert again["meta_info"]["cached_tokens"] == min(length // 16 * 16, length - 1)


@pytest.mark.parametrize(
    "prompt", ["naïve 😀👩‍👩‍👧 日本語", "\x00\ufffd\n\t ", " ", "<|im_end|>x", "é" * 99]
)
def test_prompts_of_any_characters(text_engine, prompt):
    result = greedy(text_engine, prompt)
    assert result["meta_info"]["prompt_tokens"] == len(text_engine.tokenizer.encode(prompt))
    assert isinstance(result["text"], str)


def test_a_flushed_cache_is_cold(text_engine):
    ids = list(range(300, 340))
    cached = lambda: text_engine.generate(input_ids=ids)["meta_info"]["cached_tokens"]
    assert [cached(), cached()] == [0, 32]
    assert text_engine.flush_cache().success
    assert cached() == 0


# Parameters that shape the choice


def test_a_bias_forces_or_forbids_a_token_of_its_own_request_only(text_engine):
    token = greedy(text_engine)["output_ids"][0]
    forced, forbidden, free = text_engine.generate(
        [PROMPT] * 3,
        [GREEDY | {"logit_bias": {"500": 100}}, GREEDY | {"logit_bias": {token: -100}}, GREEDY],
    )
    assert forced["output_ids"] == [500] * 12
    assert token not in forbidden["output_ids"]
    assert free["output_ids"] == greedy(text_engine)["output_ids"]


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_make_the_text_more_varied(text_engine, name):
    plain = greedy(text_engine, "import import", max_new_tokens=48, ignore_eos=True)
    varied = greedy(text_engine, "import import", max_new_tokens=48, ignore_eos=True, **{name: 2})
    assert len(set(varied["output_ids"])) > len(set(plain["output_ids"]))


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_filters_are_greedy(text_engine, params):
    result = text_engine.generate(PROMPT, {"max_new_tokens": 12, "temperature": 2.0, **params})
    assert result["output_ids"] == greedy(text_engine)["output_ids"]


def test_a_seed_gives_the_same_text_alone_in_company_and_for_text_already_cached(text_engine):
    params: dict = dict(temperature=1.0, max_new_tokens=16, sampling_seed=42)
    alone = text_engine.generate("The", params)["text"]
    others: list[dict] = [dict(params, sampling_seed=seed) for seed in range(4)]
    results = text_engine.generate([*PROMPTS[1:], "The"], [*others, params])
    assert results[-1]["text"] == alone == text_engine.generate("The", params)["text"]
    assert text_engine.generate("The", params | {"sampling_seed": 43})["text"] != alone


def test_without_a_seed_every_call_draws_anew(text_engine):
    params = {"temperature": 1.0, "max_new_tokens": 16}
    texts = {text_engine.generate("The", params)["text"] for _ in range(3)}
    assert len(texts) == 3


# The engine


def test_its_tokenizer_may_be_used_without_harm(text_engine):
    before = greedy(text_engine, PROMPT * 5)["meta_info"]["prompt_tokens"]
    text_engine.tokenizer(PROMPT * 5, truncation=True, max_length=2, padding="max_length")
    assert greedy(text_engine, PROMPT * 5)["meta_info"]["prompt_tokens"] == before == 15


def test_nothing_is_compiled_after_construction(text_engine):
    count = "num_compilations_since_start"
    before = text_engine.get_server_info()[count]  # by tests that ask for what is not built at once
    greedy(text_engine, PROMPTS)
    info = text_engine.get_server_info()
    assert info[count] == before and info["num_steps"] > 0
    assert {(4, 4, 1), (64, 4, 0)} <= set(info["compiled_steps"])


def test_the_server_info_says_what_was_resolved(text_engine):
    info = text_engine.get_server_info()
    assert info["status"] == "ready" and info["max_running_requests"] == 4
    assert info["max_req_input_len"] == 511 and info["context_length"] == 512
    assert info["max_total_num_tokens"] % info["page_size"] == 0
    assert isinstance(info["version"], str) and info["random_seed"] == 0
    [state] = info["internal_states"]
    assert state.keys() >= {"last_gen_throughput", "memory_usage"}
    assert state["memory_usage"].keys() == {"weight", "kvcache", "graph", "token_capacity"}
    assert state["effective_max_running_requests_per_dp"] == 4
    assert "tokenizer_path" in info and info["startup_time"]["compile"] > 0
