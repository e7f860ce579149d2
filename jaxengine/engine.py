"""The public engine: checks a call, hands it to the loop, waits or streams. No scheduling, no
arrays."""

import random
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.admission import make_request
from jaxengine.delivery import AsyncStream, Call, Stream, wait, wait_async
from jaxengine.inputs import Entry, normalise, refuse_unavailable
from jaxengine.loop import Loop
from jaxengine.request import Request
from jaxengine.results import StopText, Writer
from jaxengine.server_args import ServerArgs
from jaxengine.startup import start
from jaxengine.tokenizer import encode


class FlushResult(NamedTuple):
    success: bool


class Engine:
    """A model on a device, and a thread that continues prompts with it.

    `Engine(model_path=..., ...)` with the fields of `ServerArgs`, or
    `Engine(server_args=ServerArgs(...))`; `Engine()` alone serves the small embedded model. Methods
    may be called from any thread and inside or outside of any event loop. It is a context manager;
    leaving it shuts the engine down.

    Raises:
        ValueError: an argument or a checkpoint that cannot be used, with the reason.
        TypeError: an argument that does not exist.
    """

    def __init__(self, *, server_args: ServerArgs | None = None, **kwargs: Any):
        if server_args is not None and kwargs:
            raise TypeError(
                f"give server_args or fields of it, not both: {', '.join(sorted(kwargs))}"
            )
        self.server_args = server_args or ServerArgs.from_kwargs(kwargs)
        self._started = start(self.server_args)
        self._loop: Loop = self._started.loop
        self._seeds = random.Random(self._started.random_seed)
        self._tokenizer_lock = threading.Lock()
        # The thread must not keep a forgotten engine alive, and must end before the interpreter
        # does.
        self._finalizer = weakref.finalize(self, self._loop.stop)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None with `skip_tokenizer_init`."""
        return self._started.tokenizer

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        priority: int | Sequence[int] | None = None,
        **unavailable: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Continues a prompt, or each of a list, and returns `{"text", "output_ids", "meta_info"}`
        of each.

        Args:
            prompt: text; tokenised as the tokenizer does by default, without a chat template.
            sampling_params: one dictionary for all prompts, or one each; keys as in
            `SamplingParams`. input_ids: token ids instead of text, taken verbatim. stream: return
            an iterator of chunks instead, cumulative unless `stream_output` is set. The
                chunks of a list carry `index`. Closing or dropping the iterator aborts the rest.
            rid: names for `abort`; by default unique ones.
            priority: with `enable_priority_scheduling`, higher goes first.

        Returns:
            A dictionary for a single prompt with n = 1, else a list: prompts in order, the n
            samples of each one after the other.

        Raises:
            ValueError, TypeError: some part of the call is wrong; then none of it was started.
            RuntimeError: the engine failed or was shut down.
        """
        call = self._call(prompt, sampling_params, input_ids, stream, rid, priority, unavailable)
        return Stream(call) if stream else wait(call)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        priority: int | Sequence[int] | None = None,
        **unavailable: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | AsyncIterator[dict[str, Any]]:
        """`generate` for coroutines; with `stream`, awaiting it gives an asynchronous iterator."""
        call = self._call(prompt, sampling_params, input_ids, stream, rid, priority, unavailable)
        return AsyncStream(call) if stream else await wait_async(call)

    def abort(self, rid: str | Sequence[str] | None = None, *, abort_all: bool = False) -> None:
        """Ends unfinished requests; their calls return what there is and the reason `abort`."""
        if (rid is None) != abort_all:
            raise ValueError("abort: expected rid or abort_all=True, not both")
        rids = None if abort_all else [rid] if isinstance(rid, str) else list(rid or ())
        self._loop.abort(rids).result()

    def flush_cache(self) -> FlushResult:
        """Forgets all cached prefixes; refused (`success` is False) while any request is
        unfinished."""
        return FlushResult(self._loop.call(self._loop.scheduler.flush_cache).result())

    def get_server_info(self) -> dict[str, Any]:
        """The resolved arguments, sizes, timings of the start and counters of the run."""
        return self._started.info()

    def shutdown(self) -> None:
        """Ends the thread, aborts what is unfinished and frees the device memory. May be called
        again."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _call(self, prompt, sampling_params, input_ids, stream, rid, priority, unavailable) -> Call:
        if not self._loop.is_alive:
            raise RuntimeError(self._loop.end_message)
        refuse_unavailable(unavailable)
        defaults = self.server_args.sampling_defaults
        inputs = normalise(prompt, sampling_params, input_ids, rid, priority, defaults)
        requests = self._requests(inputs.entries)
        writers = [
            Writer(request, self._started.tokenizer, self._started.output_options(stream))
            for request in requests
        ]
        if stream:
            for request in requests:
                request.stream_interval = (
                    request.sampling.stream_interval or self.server_args.stream_interval
                )
        return Call(
            requests,
            writers,
            is_batch=inputs.is_batch,
            start=lambda call: self._loop.add(call.requests).result(),
            abort=self._loop.abort,
        )

    def _requests(self, entries: list[Entry]) -> list[Request]:
        """All requests of a call, or the error of the first that cannot be one."""
        ids = self._tokenise([entry for entry in entries if entry.input_ids is None])
        requests = []
        for index, entry in enumerate(entries):
            prompt_ids = next(ids) if entry.input_ids is None else entry.input_ids
            try:
                requests.append(self._request(entry, prompt_ids))
            except ValueError as error:
                where = f"prompt {index // entry.sampling.n}: " if len(entries) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        return requests

    def _request(self, entry: Entry, prompt_ids: Sequence[int]) -> Request:
        request = make_request(entry, prompt_ids, self._started.limits, self._seeds)
        field = (
            "stop" if entry.sampling.stop else "stop_regex" if entry.sampling.stop_regex else None
        )
        if field is not None:
            if self.tokenizer is None:
                raise ValueError(
                    f"{field}: needs text, and this engine has no tokenizer; use stop_token_ids"
                )
            request.stop_text = StopText(self.tokenizer, request)
        return request

    def _tokenise(self, entries: list[Entry]) -> Iterator[list[int]]:
        if not entries:
            return iter(())
        if self.tokenizer is None:
            raise ValueError(
                "prompt: this engine has no tokenizer (skip_tokenizer_init); pass input_ids"
            )
        with self._tokenizer_lock:
            return iter([encode(self.tokenizer, entry.text or "") for entry in entries])
