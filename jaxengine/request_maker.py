"""From the entries of a `generate` call to the requests of one engine: tokens, grammars, stops.
What a request must fit is told in `admission`."""

import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from jaxengine.admission import link_groups, make_request
from jaxengine.inputs import Entry
from jaxengine.request import Request
from jaxengine.results import StopText
from jaxengine.sessions import Origin
from jaxengine.startup import Started
from jaxengine.tokenizer import encode, encode_all


class RequestMaker:
    """Methods may be called from any thread."""

    def __init__(self, started: Started, seeds: random.Random):
        self._started = started
        self._seeds = seeds

    def grammars(self, entries: Sequence[Entry]) -> list[Future]:
        """All that they need; each is compiled once, beside the others."""
        found = (entry.sampling.grammar for entry in entries)
        specs = {spec for spec in found if spec is not None}
        return [self._started.grammars.compile(spec) for spec in specs]

    def requests(
        self, entries: Sequence[Entry], stream: bool, origin: Origin | None
    ) -> list[Request]:
        """All requests of a call. Waits for grammars that are still compiled.

        Raises:
            ValueError: of the first entry that cannot be one.
        """
        encoded = self.encoder(entry.text for entry in entries if entry.input_ids is None)
        requests = []
        for index, entry in enumerate(entries):
            try:
                ids = encoded(entry.text) if entry.input_ids is None else entry.input_ids
                if origin is not None:
                    ids = origin.followed_by(ids, self._started.bos_token_id)
                requests.append(self._request(entry, ids, stream))
            except ValueError as error:
                where = f"prompt {index // entry.sampling.n}: " if len(entries) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        link_groups(entries, requests)
        return requests

    def encoder(self, texts: Iterable[Any]) -> Callable[[Any], Sequence[int]]:
        """What gives the token ids of each of these texts. They are encoded by then, equal ones
        once; it raises ValueError for one that cannot be."""
        tokenizer, different = self._started.tokenizer, dict.fromkeys(texts)
        known: dict[str, array] = {}
        with suppress(ValueError):  # which will be raised with the text at fault
            if tokenizer is not None:
                encodings = encode_all(tokenizer, different)
                known |= zip(different, (array("I", each.ids) for each in encodings), strict=True)
        return lambda text: known[text] if text in known else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if self._started.tokenizer is None:
            raise ValueError(
                "prompt: this engine has no tokenizer (skip_tokenizer_init); pass input_ids"
            )
        return encode(self._started.tokenizer, text)

    def _request(self, entry: Entry, ids: Sequence[int], stream: bool) -> Request:
        started, sampling = self._started, entry.sampling
        request = make_request(entry, ids, started.limits, self._seeds)
        if stream:
            request.stream_interval = sampling.stream_interval or started.args.stream_interval
        if sampling.grammar is not None:
            request.matcher = started.grammars.compile(sampling.grammar).result().begin()
            request.skips_forced = self._skips_forced(request)
        if sampling.stop or sampling.stop_regex:
            if started.tokenizer is None:
                field = "stop" if sampling.stop else "stop_regex"
                raise ValueError(
                    f"{field}: needs text, and this engine has no tokenizer; use stop_token_ids"
                )
            request.stop_text = StopText(started.tokenizer, request)
        return request

    def _skips_forced(self, request: Request) -> bool:
        """Not where something is told or remembered of each token, nor in a group, which draws side
        by side, nor where rows that read hold up rows that decode."""
        tells = not (request.logprobs is request.states is request.processor is None)
        remembers = self._started.limits.functions.remembers(request.sampling.functions)
        is_alone = request.sampling.group is None
        goes_on = request.max_new_tokens > 0 and self._started.args.enable_mixed_chunk
        return is_alone and goes_on and not tells and not remembers
