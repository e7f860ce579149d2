"""The dictionaries users read, key by key."""

import pytest

from jaxengine import outputs

ALWAYS = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_version",
    "total_retractions",
}


def result(**changes):
    given = {
        "rid": "r",
        "text": "one two",
        "output_ids": [5, 6, 7],
        "finish_reason": outputs.stop_reason(7),
        "prompt_tokens": 4,
        "cached_tokens": 2,
    }
    return outputs.result(**given | changes)


def test_a_result_has_text_ids_and_the_keys_that_are_always_there():
    given = result()
    assert list(given) == ["text", "output_ids", "meta_info"]
    assert given["meta_info"].keys() == ALWAYS
    assert given["meta_info"] == {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 7},
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "cached_tokens": 2,
        "weight_version": "default",
        "total_retractions": 0,
    }


def test_the_end_adds_times():
    meta_info = result(e2e_latency=0.5, sent_at=1e9)["meta_info"]
    assert meta_info.keys() == ALWAYS | {"e2e_latency", "response_sent_to_client_ts"}
    assert meta_info["e2e_latency"] == 0.5 and meta_info["response_sent_to_client_ts"] == 1e9


def test_without_a_tokenizer_there_is_no_text():
    assert "text" not in result(text=None)
    assert result(text="")["text"] == ""


def test_chunks_of_a_batch_carry_their_index():
    assert "index" not in result()
    assert result(index=0)["index"] == 0


def test_incremental_chunks_say_what_is_new_and_count_everything():
    chunk = result(text_start=4, ids_start=2, finish_reason=None)
    assert chunk["text"] == "two" and chunk["output_ids"] == [7]
    assert chunk["meta_info"]["completion_tokens"] == 3
    assert chunk["meta_info"]["finish_reason"] is None


def test_a_result_shares_nothing_with_the_request():
    ids, reason = [1, 2], outputs.length_reason(2)
    given = result(output_ids=ids, finish_reason=reason)
    given["output_ids"].append(3)
    given["meta_info"]["finish_reason"]["type"] = "changed"
    assert ids == [1, 2] and reason["type"] == "length"


def test_nothing_generated_is_a_result_too():
    given = result(text="", output_ids=[], finish_reason=outputs.length_reason(0))
    assert given["output_ids"] == [] and given["meta_info"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (outputs.length_reason(16), {"type": "length", "length": 16}),
        (outputs.stop_reason(2), {"type": "stop", "matched": 2}),
        (outputs.stop_reason("\n"), {"type": "stop", "matched": "\n"}),
        (outputs.not_finite_reason(), {"type": "stop", "matched": "NaN happened"}),
        (outputs.abort_reason("gone"), {"type": "abort", "message": "gone"}),
        (
            outputs.abort_reason("bad", status_code=400, err_type="BadRequestError"),
            {
                "type": "abort",
                "message": "bad",
                "status_code": 400,
                "err_type": "BadRequestError",
            },
        ),
    ],
)
def test_finish_reasons_have_their_shapes(made, expected):
    assert made == expected


def test_the_token_that_stopped_a_request_is_not_spoken():
    ids = [5, 6, 7]
    assert outputs.spoken_ids(ids, outputs.stop_reason(7)) == [5, 6]
    assert outputs.spoken_ids(ids, outputs.stop_reason(7), no_stop_trim=True) == ids
    for reason in (
        None,
        outputs.length_reason(3),
        outputs.stop_reason("x"),
        outputs.abort_reason(""),
    ):
        assert outputs.spoken_ids(ids, reason) == ids
