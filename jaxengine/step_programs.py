"""What there is to compile for a model, over shapes alone: its steps, each for a launch size, whole
or in two parts, and the programs that install requests. How they are run is the runner's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxengine import drawing, programs
from jaxengine.compiling import Bucket
from jaxengine.executables import Executables
from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.installs import InstallSize
from jaxengine.launch import Asked, Options, Variant
from jaxengine.memory import num_bytes
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.request import Request
from jaxengine.request_state import InstallInputs, RequestState, empty_request_state, install
from jaxengine.sampling import num_fields, of_request, pack
from jaxengine.sampling.masks import num_words
from jaxengine.sampling_params import SamplingParams

# Of XLA on a GPU. Large products are cuBLAS's, which are faster than Triton's there and need no
# trying out of kernels that have to be compiled first. Of few rows it is the other way round, but
# where products have kernels of their own, which leaves the logits. Few and long kernels need no
# CUDA graph, but for conditionals: without one the host would wait for each.
CUBLAS_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
LONG_OPTIONS = CUBLAS_OPTIONS | {"xla_gpu_enable_command_buffer": "FUSION,CONDITIONAL"}
MIN_CUBLAS_ROWS, MIN_LOGITS_ROWS = 32, 8
MAX_GRAPH_TOKENS = 1024  # beyond that, kernels take longer than their launches


class StepPrograms:
    """What there is to compile for a model: every lowering, over shapes alone."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,  # tree of arrays or shapes, with shardings
        *,
        num_layers: int,
        vocab_size: int,
        page_shape: tuple[int, int, int],  # kv heads, page size, head size
        cache_dtype: Any,
        num_slots: int,
        context_length: int,
        num_stop_ids: int,
        num_bias: int,
        device: Any,
        kernels: Kernels = XLA,
        has_raw_logprobs: bool = False,
        embeds: bool = False,
        functions: Functions = NO_FUNCTIONS,
    ):
        self.device = device
        self.plain = Variant("embed" if embeds else "whole")
        self.functions = functions
        self._kernels = kernels
        # What others wrote is not known by its name: it is traced each time.
        self._executables = Executables(device, keeps=not functions)
        self._has_raw_logprobs = has_raw_logprobs
        self._identity = repr((graphdef, kernels, has_raw_logprobs))
        leaves, self._params_tree = jax.tree.flatten(params)
        self.params = self._placed(tuple(leaves))
        self._graphdef = graphdef
        self._num_layers = num_layers
        self.vocab_size = vocab_size
        self._page_shape = page_shape
        self._cache_dtype = cache_dtype
        self._make_state = partial(
            empty_request_state,
            num_slots,
            context_length,
            page_shape[1],
            num_stop_ids=num_stop_ids,
            num_bias=num_bias,
            functions=functions,
        )
        self._room = dict(num_stop_ids=num_stop_ids, num_bias=num_bias)
        self._packed: tuple[SamplingParams, frozenset[int], np.ndarray] | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return num_bytes(self.cache_shapes(0))

    @property
    def state_shapes(self) -> RequestState:
        return self._placed(jax.eval_shape(self._make_state))

    def cache_shapes(self, num_pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        kv_heads, page_size, head_size = self._page_shape
        shape = (num_pages + 1, 2, kv_heads, page_size, head_size)  # and page 0, which nobody owns
        return self._placed((jax.ShapeDtypeStruct(shape, self._cache_dtype),) * self._num_layers)

    def make_buffers(self, num_pages: int) -> tuple[tuple[jax.Array, ...], RequestState]:
        """The zeroed pool and an empty request state, on the device."""
        with jax.default_device(self.device):
            shapes = self.cache_shapes(num_pages)
            zeros = jax.jit(lambda: tuple(jax.numpy.zeros(s.shape, s.dtype) for s in shapes))
            return zeros(), jax.jit(self._make_state)()

    def pack_settings(self, request: Request) -> np.ndarray:
        """How a request is to be continued, in one row for `install`. Requests of one call have
        most of it in common: that is packed once."""
        sampling, stop_ids = request.sampling, request.stop_token_ids
        packed = self._packed
        if packed is None or packed[0] is not sampling or packed[1] != stop_ids:
            words = pack(sampling, stop_ids=stop_ids, **self._room)
            chosen = self.functions.pack(sampling.functions, sampling.custom_params or {})
            packed = self._packed = sampling, stop_ids, np.concatenate([words, chosen])
        return of_request(packed[2], prompt_len=len(request.prompt_ids), seed=request.seed)

    def lower_step(self, bucket: Bucket, num_pages: int, variant: Variant | None = None) -> Any:
        variant = variant or self.plain
        step = partial(self._step, bucket=bucket, variant=variant)
        kind = f"decode{bucket.num_steps}"
        if bucket.num_steps and bucket.num_tokens > bucket.num_rows:
            kind += f"_{bucket.num_tokens}"
        if not bucket.num_steps:
            kind = f"{'embed' if variant.part == 'embed' else 'extend'}_{bucket.num_tokens}"
        step.__name__ = f"{kind}x{bucket.num_rows}"  # type: ignore[attr-defined]
        arguments = self.step_arguments(bucket, num_pages, variant)
        return self._lower(step, arguments, (1, 2, *range(5, len(arguments))))

    def trace_step(
        self, bucket: Bucket, num_pages: int, variant: Variant | None = None
    ) -> Callable[[], Any]:
        """What compiles a step or the first part of one, or loads it."""
        variant = variant or self.plain
        options = None
        if self.device.platform == "gpu":
            options = compiler_options(bucket, self._kernels.hopper_products)
        arguments = self.step_arguments(bucket, num_pages, variant)
        results = arguments[1], arguments[2], *variant.structure
        return self._executables.through(
            ("step", bucket, variant, options, self._identity, arguments),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure(results),
            trace=lambda: partial(
                self.lower_step(bucket, num_pages, variant).compile, compiler_options=options
            ),
        )

    def trace_draw(self, num_rows: int, variant: Variant) -> Callable[[], Any]:
        """What compiles the second part of steps of so many rows, or some of it, or loads it."""
        rows, V = self._rows(num_rows, variant), self.vocab_size
        logits = self.logits_shape(num_rows)
        masks = self._placed(jax.ShapeDtypeStruct((num_rows, num_words(V)), np.int32))
        other = logits if variant.part == "choose" else masks
        arguments = *_split(self.state_shapes), rows, logits, other
        made = variant.structure
        results = made if variant.part == "adjust" else (arguments[0], *made)
        step = partial(self._draw, variant=variant)
        step.__name__ = f"{variant.part}_x{num_rows}"  # type: ignore[attr-defined]
        donated = () if variant.part == "adjust" else (0,)
        return self._executables.through(
            ("draw", variant, self._identity, arguments),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure(results),
            trace=lambda: self._lower(step, arguments, donated).compile,
        )

    def _lower(self, step: Any, arguments: Any, donated: tuple[int, ...]) -> Any:
        with _exact_float32(self.params):
            return jax.jit(step, donate_argnums=donated, keep_unused=True).lower(*arguments)

    def step_arguments(self, bucket: Bucket, num_pages: int, variant: Variant) -> tuple[Any, ...]:
        """Parameters, KV pool, the request state that a step changes and that which it only reads,
        and packed rows: shapes. Of a step that pauses the logits, too, which it writes over."""
        rows, cache = self._rows(bucket.num_packed, variant), self.cache_shapes(num_pages)
        arguments = self.params, cache, *_split(self.state_shapes), rows
        if variant.part == "read":
            arguments = *arguments, self.logits_shape(bucket.num_rows)
        return arguments

    def logits_shape(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Between the parts of a step."""
        return self._placed(jax.ShapeDtypeStruct((num_rows, self.vocab_size), np.float32))

    def _rows(self, num_rows: int, variant: Variant) -> Any:
        return self._placed(jax.ShapeDtypeStruct((num_rows, variant.num_fields), np.int32))

    def empty_install(self, size: InstallSize) -> InstallInputs:
        """Inputs that install nothing, to be filled."""
        num_rows = size.num_rows
        num_slots, num_pages = self.state_shapes.page_table.shape
        num_tokens = min(num_rows * self.state_shapes.tokens.shape[1], size.num_tokens)
        zeros: Any = partial(np.zeros, dtype=np.int32)
        width = num_fields(self.state_shapes.settings.sampling) + self.functions.num_fields
        return InstallInputs(
            slots=zeros(num_rows) + np.int32(num_slots),
            starts=zeros(num_rows),
            num_tokens=zeros(num_rows),
            settings=zeros((num_rows, width)),
            page_table=zeros((num_rows, num_pages)),
            tokens=zeros(num_tokens),
        )

    def trace_install(self, size: InstallSize) -> Callable[[], Any]:
        """What compiles a program that installs requests, or loads it."""
        arguments = self.state_shapes, self._placed(self.empty_install(size))
        program = partial(install, functions=self.functions)
        program.__name__ = "install"  # type: ignore[attr-defined]
        return self._executables.through(
            ("install", arguments),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure(arguments[0]),
            trace=lambda: self._lower(program, arguments, (0,)).compile,
        )

    def _step(self, params, cache, changing, settings, rows, *logits, bucket, variant):
        # Logits that are given are not read: those that are made take their memory.
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._params_tree, params))
        rows, new_tokens, options = self._options(rows, variant)
        run: Callable[..., Any]
        if variant.part == "embed":
            run = partial(programs.embed, num_tokens=bucket.num_tokens)
        elif variant.part == "read":
            num_tokens = None if bucket.num_steps else bucket.num_tokens
            run = partial(
                programs.read,
                num_tokens=num_tokens,
                num_drawing=bucket.num_rows,
                new_tokens=new_tokens,
            )
        elif bucket.num_steps:
            run = partial(programs.decode, num_steps=bucket.num_steps)
        else:
            run = partial(programs.extend, num_tokens=bucket.num_tokens)
        cache, state, *made = run(
            model, cache, RequestState(*changing, settings=settings), rows, options=options
        )
        # Settings only change when a request is installed: they are read here, not donated.
        return cache, _split(state)[0], *made

    def _draw(self, changing, settings, rows, logits, other, *, variant):
        rows, _, options = self._options(rows, variant)
        state = RequestState(*changing, settings=settings)
        if variant.part == "adjust":
            return (drawing.adjusted_logits(state, rows, logits, other),)
        run = drawing.choose if variant.part == "choose" else drawing.draw
        state, told = run(state, rows, logits, other, options=options)
        return _split(state)[0], told

    def _options(self, rows: jax.Array, variant: Variant) -> tuple[jax.Array, jax.Array, Options]:
        """The rows' own fields, the tokens that they bring along, and all that a program is made
        for."""
        rows, new_tokens, ids = variant.split(rows)
        asked = variant.wanted and Asked(variant.wanted, ids, self._has_raw_logprobs)
        return rows, new_tokens, Options(asked, variant.states, self.functions, self._kernels)

    def _placed(self, shapes: Any) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )


def compiler_options(bucket: Bucket, hopper_products: bool) -> dict[str, Any] | None:
    """Of a step on a GPU, whose products of few rows may have kernels of their own."""
    if bucket.num_tokens > MAX_GRAPH_TOKENS:
        return LONG_OPTIONS
    least = MIN_LOGITS_ROWS if hopper_products else MIN_CUBLAS_ROWS
    return CUBLAS_OPTIONS if bucket.num_tokens >= least else None


def _exact_float32(params: tuple[jax.ShapeDtypeStruct, ...]) -> AbstractContextManager:
    """GPUs multiply float32 in a shorter type by default; who asks for float32 wants it."""
    is_float32 = any(param.dtype == np.float32 for param in params)
    return jax.default_matmul_precision("highest") if is_float32 else nullcontext()


def _split(state: RequestState) -> tuple[tuple[Any, ...], Any]:
    """What steps change, and the settings."""
    *changing, settings = state
    return tuple(changing), settings
