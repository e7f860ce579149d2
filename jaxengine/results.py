"""Requests to text and dictionaries: the watch on stop strings while a request runs, and the writer
of its results. It knows one request at a time and no queue.
"""

import time
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxengine import outputs
from jaxengine.hidden_states import HiddenStates
from jaxengine.request import Progress, Request
from jaxengine.stopping import StopMatcher
from jaxengine.tokenizer import Detokenizer


class OutputOptions(NamedTuple):
    """How the results of a call are written."""

    ids_are_deltas: bool = False  # chunks hold the ids since the chunk before
    text_is_delta: bool = False


class StopText:
    """The text of a request that has stop strings or patterns, fed by the loop token by token."""

    def __init__(self, tokenizer: Any, request: Request):
        sampling = request.sampling
        self._detokenizer = _detokenizer(tokenizer, request)
        self._matcher = StopMatcher(
            sampling.stop or (), sampling.stop_regex or (), no_stop_trim=sampling.no_stop_trim
        )
        self.shown = ""  # what a stream may show: no end that a stop string could begin with

    def add(self, token: int) -> str | None:
        """The stop string or pattern that the text with this token contains, if any."""
        self._detokenizer.add([token])
        return self._search(self._detokenizer.text)

    def finish(self) -> str | None:
        """The same for what was withheld as an incomplete character, once nothing more comes."""
        matched = self._search(text := self._detokenizer.finish())
        if matched is None:
            self.shown = text
        return matched

    def _search(self, text: str) -> str | None:
        stop = self._matcher.search(text)
        self.shown = text[: self._matcher.shown_len(text) if stop is None else stop.text_len]
        return None if stop is None else stop.matched


class Writer:
    """Writes what a request has come to by some moment of it; moments in order."""

    def __init__(self, request: Request, tokenizer: Any, options: OutputOptions):
        self._request = request
        self._options = options
        self._tokenizer = tokenizer
        self._num_fed = self._num_ids_written = self._num_chars_written = 0
        self._was_sent = False

    def write(self, progress: Progress) -> dict[str, Any]:
        request = self._request
        output_ids = request.output_ids[: progress.num_tokens]
        text = self._text(progress, output_ids)
        is_end = progress.finish_reason is not None
        latency = (request.finish_time or time.time()) - request.arrival_time
        result = outputs.result(
            rid=request.rid,
            text=text,
            output_ids=output_ids,
            finish_reason=progress.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.num_cached or 0,
            total_retractions=request.num_retractions,
            weight_version=progress.weight_version,
            e2e_latency=latency if is_end else None,
            sent_at=None if self._was_sent else time.time(),
            text_start=self._num_chars_written if self._options.text_is_delta else 0,
            ids_start=self._num_ids_written if self._options.ids_are_deltas else 0,
            logprobs=self._logprobs(len(output_ids)),
            hidden_states=self._hidden_states(len(output_ids)) if is_end else None,
        )
        self._was_sent = True
        self._num_ids_written, self._num_chars_written = len(output_ids), len(text or "")
        return result

    def _logprobs(self, num_outputs: int) -> dict[str, Any] | None:
        asked, prompt = self._request.logprobs, self._request.prompt_ids
        start = self._num_ids_written if self._options.text_is_delta else 0
        return None if asked is None else outputs.logprob_lists(asked, prompt, num_outputs, start)

    def _hidden_states(self, num_outputs: int) -> Any:
        """A vector where only the last is asked for."""
        books = self._request.states
        if books is None or not books.parts:  # or it ended before anything was read
            return None
        states = HiddenStates(books, len(self._request.prompt_ids), num_outputs)
        return states.array()[0] if books.only_last and len(books.places) == 1 else states

    def _text(self, progress: Progress, output_ids: list[int]) -> str | None:
        if self._tokenizer is None:
            return None
        if self._request.stop_text is not None:
            return progress.stop_text
        if not output_ids:
            return ""
        is_kept = self._request.sampling.no_stop_trim
        if self._request.matcher is not None:
            # The last token may be one by which a grammar is complete.
            is_kept |= output_ids[-1] not in self._request.stop_token_ids
        spoken = outputs.spoken_ids(output_ids, progress.finish_reason, no_stop_trim=is_kept)
        self._detokenizer.add(spoken[self._num_fed :])
        self._num_fed = len(spoken)
        is_end = progress.finish_reason is not None
        return self._detokenizer.finish() if is_end else self._detokenizer.text

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return _detokenizer(self._tokenizer, self._request)


class EmbeddingWriter:
    """Writes the result of a request that was read and not continued."""

    def __init__(
        self,
        request: Request,
        *,
        dimensions: int | None = None,
        normalizes: bool = False,  # what was cut
        scores: bool = False,  # a single one is a number, not a list
    ):
        self._request = request
        self._dimensions, self._normalizes, self._scores = dimensions, normalizes, scores

    def write(self, progress: Progress) -> dict[str, Any]:
        request = self._request
        return outputs.embedding_result(
            rid=request.rid,
            embedding=self._embedding(),
            finish_reason=progress.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            total_retractions=request.num_retractions,
            weight_version=progress.weight_version,
            e2e_latency=(request.finish_time or time.time()) - request.arrival_time,
        )

    def _embedding(self) -> Any:
        values = self._request.embedding
        if values is None:  # the request was aborted
            return []
        if self._dimensions is not None:
            values = values[: self._dimensions]
            if self._normalizes:
                values = values / max(float(np.linalg.norm(values)), 1e-12)
        return values.item() if self._scores and len(values) == 1 else values.tolist()


def _detokenizer(tokenizer: Any, request: Request) -> Detokenizer:
    skips = request.sampling.skip_special_tokens
    return Detokenizer(tokenizer, request.prompt_ids, skip_special_tokens=skips)
