"""The public engine: checks a call, hands it to the loop, waits or streams. No scheduling, no
arrays."""

import asyncio
import copy
import random
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import wait as wait_for
from functools import cached_property, partial
from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from jaxengine.delivery import AsyncStream, Call, Stream, wait, wait_async
from jaxengine.engine_control import ControlMethods
from jaxengine.engine_embedding import EmbeddingMethods
from jaxengine.engine_profiling import ProfilingMethods
from jaxengine.engine_scoring import ScoringMethods
from jaxengine.engine_sessions import SessionCall, SessionMethods
from jaxengine.engine_weights import WeightMethods
from jaxengine.function_checks import registered
from jaxengine.inputs import Inputs, normalise
from jaxengine.interrupts import heeds_ctrl_c
from jaxengine.logprob_inputs import LogprobOptions
from jaxengine.loop import Loop
from jaxengine.request_maker import RequestMaker
from jaxengine.results import Writer
from jaxengine.sampling.extensions import Intervention
from jaxengine.sampling_params import SamplingParams
from jaxengine.server_args import ServerArgs
from jaxengine.sessions import Sessions
from jaxengine.signatures import takes
from jaxengine.startup import start
from jaxengine.unavailable import refuse_unavailable

Sampling = Mapping[str, Any] | SamplingParams


class FlushResult(NamedTuple):
    success: bool


class Engine(
    ScoringMethods,
    EmbeddingMethods,
    WeightMethods,
    SessionMethods,
    ProfilingMethods,
    ControlMethods,
):
    """A model on a device, and a thread that continues prompts with it.

    `Engine(model_path=..., ...)` with the fields of `ServerArgs`, or
    `Engine(server_args=ServerArgs(...))`; `Engine()` alone serves the small embedded model. Methods
    may be called from any thread and inside or outside of any event loop. It is a context manager;
    leaving it shuts the engine down.

    Functions of your own are compiled into the steps: `logits_processors` and `interventions` by
    name, for requests to choose in `sampling_params`, and one `sampler`; see `LogitsProcessor`,
    `Sampler` and `Intervention`. A plain function of (logits, params, row) is a processor without
    parameters.

    Raises:
        ValueError: an argument or a checkpoint that cannot be used, with the reason.
        TypeError: an argument that does not exist.
    """

    def __init__(
        self,
        *,
        server_args: ServerArgs | None = None,
        logits_processors: Mapping[str, Any] | None = None,
        sampler: Any = None,
        interventions: Mapping[str, Intervention] | None = None,
        **kwargs: Any,
    ):
        if server_args is not None and kwargs:
            raise TypeError(
                f"give server_args or fields of it, not both: {', '.join(sorted(kwargs))}"
            )
        if server_args is not None and not isinstance(server_args, ServerArgs):
            raise TypeError(f"server_args: expected a ServerArgs, got {server_args!r}")
        self.server_args = server_args or ServerArgs(**kwargs)
        _check_defaults(self.server_args)
        functions = registered(logits_processors, sampler, interventions)
        with heeds_ctrl_c():
            self._started = start(self.server_args, functions)
        self._loop: Loop = self._started.loop
        self._seeds = random.Random(self._started.random_seed)
        self._maker = RequestMaker(self._started, self._seeds)
        self._encoder = self._maker.encoder
        self._sessions = Sessions()
        # The thread must not keep a forgotten engine alive, and must end before the interpreter
        # does.
        self._finalizer = weakref.finalize(self, self._loop.stop)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None with `skip_tokenizer_init`.

        A copy of the engine's: some calls of it leave truncation or padding switched on.
        """
        return copy.deepcopy(self._started.tokenizer)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        input_ids: ArrayLike | None = None,
        *,
        return_logprob: bool | Sequence[bool] | None = None,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        token_ids_logprob: Sequence[Any] | None = None,
        custom_logit_processor: Any = None,
        return_hidden_states: Any = None,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        priority: int | Sequence[int] | None = None,
        session_params: Mapping[str, Any] | None = None,
        **unavailable: Any,
    ) -> Any:
        """Continues a prompt, or each of a list, and returns `{"text", "output_ids", "meta_info"}`
        of each.

        Args:
            prompt: text; tokenised as the tokenizer does by default, without a chat template.
            sampling_params: one dictionary for all prompts, or one each; its keys are the fields
                of `SamplingParams`.
            input_ids: token ids instead of text, taken verbatim: a list or array of ids, or a list
                of such.
            return_logprob: log-probabilities in `meta_info`, as `input_token_logprobs` and
                `output_token_logprobs`: entries `(logprob, token id, None)`. An output's are of the
                distribution after penalties, biases and temperature (`logprobs_mode` has raw ones).
            logprob_start_len: the first prompt token with an entry, whose logprob is None; -1: the
                last one.
            top_logprobs_num: so many of the likeliest tokens for each entry, as
                `*_top_logprobs`.
            token_ids_logprob: for each entry these tokens too, as `*_token_ids_logprobs`; with
                max_new_tokens = 0 for what might come next.
            custom_logit_processor: a `CustomLogitProcessor`, for all prompts or a list of one each:
                NumPy on the host, and slow. Registered functions are chosen in `sampling_params`.
            return_hidden_states: `HiddenStates` of NumPy arrays, as `hidden_states` in `meta_info`.
                True: the final ones, of all tokens that were read. "last": of the last of these, a
                vector. A dict has `layers`, numbers as in transformers or points such as
                "mlp_output.3", and `positions`, a list, "all" or "last".
            stream: return an iterator of chunks instead. They are cumulative, unless the engine has
                `incremental_streaming_output`; those of a list carry `index`. Closing or dropping
                the iterator aborts the rest.
            rid: names for `abort`, by default unique ones. One name for a list is given to its
                prompts as `name_0`, `name_1` and so on, and likewise to `n` samples.
            priority: with `enable_priority_scheduling`, higher goes first.
            session_params: `{"id": session}` of an open session; with `"rid"` the request goes on
                from that one of it: its prompt, its output, then this prompt. `"offset"` keeps only
                so many of those tokens (-n: all but the last n), `"drop_previous_output"` only the
                prompt. `"replace": True` makes this the only one that goes on from there and aborts
                what is unfinished; without a `"rid"`, the only one of the session.

        Returns:
            A dictionary for a single prompt with n = 1, else a list: prompts in order, the n
            samples of each one after the other. With `stream` a `Stream` of such dictionaries.

        Raises:
            ValueError, TypeError: some part of the call is wrong; then none of it was started.
            RuntimeError: the engine failed or was shut down.
        """
        options = dict(
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            token_ids_logprob=token_ids_logprob,
            custom_logit_processor=custom_logit_processor,
            return_hidden_states=return_hidden_states,
            rid=rid,
            priority=priority,
            **unavailable,
        )
        with heeds_ctrl_c():
            inputs = self._inputs(prompt, sampling_params, input_ids, **options)
            wait_for(self._maker.grammars(inputs.entries))
            call = self._call(inputs, stream, session_params)
            if compiling := self._started.variants.prepare(call.requests):
                compiling.result()
            return Stream(call) if stream else wait(call)

    @takes(generate)
    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        session_params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`generate` for coroutines; with `stream`, awaiting it gives an `AsyncStream`."""
        inputs = self._inputs(prompt, sampling_params, input_ids, **options)
        grammars = map(asyncio.wrap_future, self._maker.grammars(inputs.entries))
        await asyncio.gather(
            *map(asyncio.shield, grammars),
            return_exceptions=True,  # they are raised below, with their prompts
        )
        call = self._call(inputs, stream, session_params)
        if compiling := self._started.variants.prepare(call.requests):
            await asyncio.shield(asyncio.wrap_future(compiling))
        return await AsyncStream(call).start() if stream else await wait_async(call)

    def abort(self, rid: str | Sequence[str] | None = None, *, abort_all: bool = False) -> None:
        """Ends unfinished requests; their calls return what there is and the reason `abort`.

        Names of requests that have ended, or never were, are no error.
        """
        if (rid is None) != abort_all:
            raise ValueError("abort: expected either rid or abort_all=True")
        rids = [rid] if isinstance(rid, str) else rid
        is_list = isinstance(rids, list | tuple) and all(isinstance(each, str) for each in rids)
        if rids is not None and not is_list:
            raise ValueError(f"abort: expected a rid or a list of them, got {rid!r}")
        self._loop.abort(rids).result()

    def flush_cache(self) -> FlushResult:
        """Forgets all cached prefixes and compiled grammars; refused (`success` is False) while any
        request is unfinished."""
        self._started.grammars.clear()
        return FlushResult(self._loop.call(self._loop.scheduler.flush_cache).result())

    def shutdown(self) -> None:
        """Ends the thread, aborts what is unfinished and frees the device memory. May be called
        again."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _inputs(self, prompt: Any, sampling_params: Any, input_ids: Any, **options: Any) -> Inputs:
        """What a call asks for, sample by sample; the options are `generate`'s by name."""
        if not self._loop.is_alive:
            raise self._loop.refusal()
        if self._started.found.embeddings is not None:
            raise ValueError(
                "generate: this engine makes embeddings; call encode, or load a model that "
                "generates, without is_embedding"
            )
        take = lambda name: options.pop(name, None)
        asked: dict[str, Any] = dict(
            logprobs=LogprobOptions(*map(take, LogprobOptions._fields)),
            processor=take("custom_logit_processor"),
            states=take("return_hidden_states"),
            rid=take("rid"),
            priority=take("priority"),
        )
        refuse_unavailable(options)
        args = self.server_args
        has_priority = args.enable_priority_scheduling or args.schedule_policy == "priority"
        if asked["priority"] is not None and not has_priority:
            warnings.warn("priority: needs enable_priority_scheduling=True", stacklevel=3)
        return normalise(
            prompt, sampling_params, input_ids, defaults=args.sampling_defaults, **asked
        )

    def _call(self, inputs: Inputs, stream: bool, session_params: Mapping[str, Any] | None) -> Call:
        origin = self._origin(session_params)
        requests = self._maker.requests(inputs.entries, stream, origin)
        options = self._started.output_options(stream)
        writers = [Writer(request, self._started.tokenizer, options) for request in requests]
        make_call = Call if origin is None else partial(SessionCall, self._sessions, origin)
        return make_call(requests, writers, self._loop, is_batch=inputs.is_batch, owner=self)


def _check_defaults(args: ServerArgs) -> None:
    """Tells of a mistake in them now rather than with the first call."""
    try:
        SamplingParams.from_dict(args.sampling_defaults)
    except (TypeError, ValueError) as error:
        raise type(error)(f"preferred_sampling_params: {error}") from None
