"""Text of requests while they run: what stop strings cut, what streams show, what chunks say."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fakes import make_request

from jaxengine import outputs
from jaxengine.request import Progress, Request
from jaxengine.results import OutputOptions, StopText, Writer
from jaxengine.sampling_params import SamplingParams
from jaxengine.tokenizer import encode, load_tokenizer

TEXT = "the dict's keys — été 👩‍💻, 漢字\n— end"
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(str(files("jaxengine"))) / "assets" / "demo")


def request_of(tokenizer: Any, **sampling: Any) -> Request:
    request = make_request(encode(tokenizer, "In Python"))
    request.sampling = SamplingParams(**sampling)
    if request.sampling.stop or request.sampling.stop_regex:
        request.stop_text = StopText(tokenizer, request)
    return request


def chunks(
    tokenizer: Any, options: OutputOptions, reason: dict[str, Any], ids: list[int], **sampling: Any
) -> list[dict[str, Any]]:
    """What a stream says that is read after every token."""
    request = request_of(tokenizer, **sampling)
    writer = Writer(request, tokenizer, options)
    written = []
    for token in ids:
        request.output_ids.append(token)
        is_last = len(request.output_ids) == len(ids)
        written.append(writer.write(Progress(len(request.output_ids), reason if is_last else None)))
    return written


def test_cumulative_chunks_begin_with_those_before_and_end_with_the_text(tokenizer):
    ids = encode(tokenizer, TEXT)
    written = chunks(tokenizer, OutputOptions(), outputs.length_reason(len(ids)), ids)
    texts = [chunk["text"] for chunk in written]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1] == TEXT and not any("\ufffd" in text for text in texts)
    assert [chunk["output_ids"] for chunk in written] == [ids[: i + 1] for i in range(len(ids))]


def test_with_stream_output_only_the_ids_are_new_ones(tokenizer):
    ids = encode(tokenizer, TEXT)
    options = OutputOptions(ids_are_deltas=True)
    written = chunks(tokenizer, options, outputs.length_reason(len(ids)), ids)
    assert [chunk["output_ids"] for chunk in written] == [[token] for token in ids]
    assert written[-1]["text"] == TEXT
    assert [chunk["meta_info"]["completion_tokens"] for chunk in written][-1] == len(ids)


def test_incremental_chunks_add_up(tokenizer):
    ids = encode(tokenizer, TEXT)
    options = OutputOptions(ids_are_deltas=True, text_is_delta=True)
    written = chunks(tokenizer, options, outputs.length_reason(len(ids)), ids)
    assert "".join(chunk["text"] for chunk in written) == TEXT
    assert [token for chunk in written for token in chunk["output_ids"]] == ids


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_moments_left_out_change_nothing(tokenizer, step):
    ids = encode(tokenizer, TEXT)
    request = request_of(tokenizer)
    request.output_ids = ids
    writer = Writer(request, tokenizer, OutputOptions(ids_are_deltas=True, text_is_delta=True))
    moments = [*range(1, len(ids), step)]
    written = [writer.write(Progress(num_tokens)) for num_tokens in moments]
    written.append(writer.write(Progress(len(ids), outputs.length_reason(len(ids)))))
    assert "".join(chunk["text"] for chunk in written) == TEXT
    assert [token for chunk in written for token in chunk["output_ids"]] == ids


@pytest.mark.parametrize("skips", [True, False])
def test_the_token_that_stopped_is_in_the_ids_and_in_the_text_only_on_demand(tokenizer, skips):
    ids = [*encode(tokenizer, " a list"), END]
    options, reason = OutputOptions(), outputs.stop_reason(END)
    [*_, last] = chunks(tokenizer, options, reason, ids, skip_special_tokens=skips)
    assert last["text"] == " a list" and last["output_ids"] == ids
    [*_, last] = chunks(
        tokenizer, options, reason, ids, skip_special_tokens=skips, no_stop_trim=True
    )
    assert last["text"] == (" a list" if skips else " a list<|im_end|>")


def test_times_are_told_once(tokenizer):
    ids = encode(tokenizer, " a list of")
    written = chunks(tokenizer, OutputOptions(), outputs.length_reason(len(ids)), ids)
    sent = ["response_sent_to_client_ts" in chunk["meta_info"] for chunk in written]
    ended = ["e2e_latency" in chunk["meta_info"] for chunk in written]
    assert sent == [True] + [False] * (len(ids) - 1)
    assert ended == [False] * (len(ids) - 1) + [True]
    assert written[-1]["meta_info"]["e2e_latency"] >= 0


def test_without_a_tokenizer_there_are_ids_only(tokenizer):
    request = request_of(tokenizer)
    request.output_ids = [5]
    chunk = Writer(request, None, OutputOptions()).write(Progress(1, weight_version="v2"))
    assert chunk.keys() == {"output_ids", "meta_info"}
    assert chunk["meta_info"]["weight_version"] == "v2"


def test_the_text_of_no_tokens_is_empty(tokenizer):
    writer = Writer(request_of(tokenizer), tokenizer, OutputOptions())
    assert writer.write(Progress(0))["text"] == ""
    assert writer.write(Progress(0, outputs.abort_reason("enough")))["text"] == ""


def test_half_a_character_at_the_end_is_shown_as_what_it_is(tokenizer):
    ids = encode(tokenizer, "漢")[:-1]
    assert ids
    written = chunks(tokenizer, OutputOptions(), outputs.length_reason(len(ids)), ids)
    assert written[-1]["text"].strip("\ufffd") == "" and written[-1]["text"]


# Stop strings


def fed(stop_text: StopText, ids: list[int]) -> tuple[str | None, list[str]]:
    """The stop found, and what was shown after each token."""
    shown = []
    for token in ids:
        matched = stop_text.add(token)
        shown.append(stop_text.shown)
        if matched is not None:
            return matched, shown
    return stop_text.finish(), [*shown, stop_text.shown]


def test_nothing_that_a_stop_string_may_begin_with_is_shown_early(tokenizer):
    request = request_of(tokenizer, stop=["keys — ét", "zzz"])
    matched, shown = fed(request.stop_text, encode(tokenizer, TEXT))
    assert matched == "keys — ét" and shown[-1] == "the dict's "
    assert all("the dict's ".startswith(text) for text in shown)


def test_the_stop_string_stays_on_demand_and_nothing_after_it(tokenizer):
    request = request_of(tokenizer, stop="ke", no_stop_trim=True)
    matched, shown = fed(request.stop_text, encode(tokenizer, TEXT))
    assert matched == "ke" and shown[-1] == "the dict's ke"


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end(tokenizer):
    request = request_of(tokenizer, stop="end.")
    matched, shown = fed(request.stop_text, encode(tokenizer, TEXT))
    assert matched is None and shown[-2] == TEXT[: -len("end")] and shown[-1] == TEXT


def test_an_expression_reports_its_pattern_and_cuts_nothing(tokenizer):
    request = request_of(tokenizer, stop_regex=r"key\w")
    matched, shown = fed(request.stop_text, encode(tokenizer, TEXT))
    assert matched == r"key\w" and shown[-1].startswith("the dict's keys")


def test_a_stop_string_of_withheld_bytes_is_found_at_the_end(tokenizer):
    request = request_of(tokenizer, stop="\ufffd")
    ids = encode(tokenizer, "漢")[:-1]
    matched, shown = fed(request.stop_text, ids)
    assert matched == "\ufffd" and shown[-1] == ""


def test_the_writer_shows_what_the_watch_on_stop_strings_does(tokenizer):
    request = request_of(tokenizer, stop="keys")
    writer = Writer(request, tokenizer, OutputOptions(ids_are_deltas=True, text_is_delta=True))
    texts = []
    for token in encode(tokenizer, TEXT):
        request.output_ids.append(token)
        matched = request.stop_text.add(token)
        request.finish_reason = outputs.stop_reason(matched) if matched else None
        request.publish("default")
        texts.append(writer.write(request.progress)["text"])
        if matched:
            break
    assert "".join(texts) == "the dict's " and request.finish_reason == outputs.stop_reason("keys")
