"""What there is to compile for a model, over shapes alone: its steps, each for a launch size, and
the program that installs requests. How they are run is the runner's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxengine import programs
from jaxengine.compiling import Bucket
from jaxengine.executables import Executables
from jaxengine.logprobs import Wanted
from jaxengine.memory import num_bytes
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.programs import InstallInputs, RequestState
from jaxengine.request import Request
from jaxengine.sampling import empty_state, pack

INSTALL = "install"  # key of the one program that is not a step
INSTALL_ROWS = 8  # requests that it installs at a time
MAX_INSTALL_TOKENS = 8192  # and tokens of their histories

# Of XLA on a GPU. Large products are cuBLAS's, which are faster than Triton's there. Few and long
# kernels need no CUDA graph, but for conditionals: without one the host would wait for each.
EXTEND_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_command_buffer": "FUSION,CONDITIONAL",
}


class StepPrograms:
    """What there is to compile for a model: every lowering, over shapes alone."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,  # tree of arrays or shapes, with shardings
        *,
        num_layers: int,
        page_shape: tuple[int, int, int],  # kv heads, page size, head size
        cache_dtype: Any,
        num_slots: int,
        context_length: int,
        num_stop_ids: int,
        num_bias: int,
        device: Any,
        kernels: Kernels = XLA,
        has_raw_logprobs: bool = False,
    ):
        self.device = device
        self._kernels = kernels
        self._executables = Executables(device)
        self._has_raw_logprobs = has_raw_logprobs
        self._identity = repr((graphdef, kernels, has_raw_logprobs))
        leaves, self._params_tree = jax.tree.flatten(params)
        self.params = self._placed(tuple(leaves))
        self._graphdef = graphdef
        self._num_layers = num_layers
        self._page_shape = page_shape
        self._cache_dtype = cache_dtype
        self._make_state = lambda: RequestState(
            *programs.empty_tables(num_slots, context_length, page_shape[1]),
            sampling=empty_state(num_slots + 1, num_stop_ids, num_bias),
        )
        self._num_stop_ids, self._num_bias = num_stop_ids, num_bias

    @property
    def num_sampling_fields(self) -> int:
        """Length of a packed row of sampling parameters."""
        state = self.state_shapes.sampling
        return sum(leaf.size // leaf.shape[0] for leaf in state)

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

    def pack_sampling(self, request: Request) -> np.ndarray:
        return pack(
            request.sampling,
            prompt_len=len(request.prompt_ids),
            seed=request.seed,
            stop_ids=request.stop_token_ids,
            num_stop_ids=self._num_stop_ids,
            num_bias=self._num_bias,
        )

    def lower_step(self, bucket: Bucket, num_pages: int, wanted: Wanted | None = None) -> Any:
        step = partial(self._step, bucket=bucket, wanted=wanted)
        kind = f"decode{bucket.num_steps}" if bucket.num_steps else f"extend_{bucket.num_tokens}"
        step.__name__ = f"{kind}x{bucket.num_rows}"  # type: ignore[attr-defined]
        with _exact_float32(self.params):
            return jax.jit(step, donate_argnums=(1, 2, 3)).lower(
                *self._step_arguments(bucket, num_pages, wanted)
            )

    def trace_step(
        self, bucket: Bucket, num_pages: int, wanted: Wanted | None = None
    ) -> Callable[[], Any]:
        """What compiles a step, or loads it."""
        is_extend = self.device.platform == "gpu" and not bucket.num_steps
        options = EXTEND_OPTIONS if is_extend else None
        arguments = self._step_arguments(bucket, num_pages, wanted)
        _, cache, tokens, page_table, *_ = arguments
        results = cache, tokens, page_table, programs.outputs_structure(wanted)
        return self._executables.through(
            ("step", bucket, wanted, options, self._identity, arguments),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure(results),
            trace=lambda: partial(
                self.lower_step(bucket, num_pages, wanted).compile, compiler_options=options
            ),
        )

    def _step_arguments(
        self, bucket: Bucket, num_pages: int, wanted: Wanted | None
    ) -> tuple[Any, ...]:
        fields = programs.NUM_ROW_FIELDS + (wanted.ids if wanted else 0)
        rows = jax.ShapeDtypeStruct((bucket.num_rows, fields), np.int32)
        state, cache = self.state_shapes, self.cache_shapes(num_pages)
        return (
            self.params,
            cache,
            state.tokens,
            state.page_table,
            state.sampling,
            self._placed(rows),
        )

    def empty_install(self) -> InstallInputs:
        """Inputs that install nothing, to be filled."""
        num_slots, num_pages = self.state_shapes.page_table.shape
        num_tokens = min(INSTALL_ROWS * self.state_shapes.tokens.shape[1], MAX_INSTALL_TOKENS)
        zeros: Any = partial(np.zeros, dtype=np.int32)
        return InstallInputs(
            slots=zeros(INSTALL_ROWS) + np.int32(num_slots),
            starts=zeros(INSTALL_ROWS),
            num_tokens=zeros(INSTALL_ROWS),
            sampling=zeros((INSTALL_ROWS, self.num_sampling_fields)),
            page_table=zeros((INSTALL_ROWS, num_pages)),
            tokens=zeros(num_tokens),
        )

    def trace_install(self) -> Callable[[], Any]:
        """What compiles the program that installs requests, or loads it."""
        arguments = self.state_shapes, self._placed(self.empty_install())
        return self._executables.through(
            ("install", arguments),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure(arguments[0]),
            trace=lambda: jax.jit(programs.install, donate_argnums=0).lower(*arguments).compile,
        )

    def _step(self, params, cache, tokens, page_table, sampling, rows, *, bucket, wanted=None):
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._params_tree, params))
        state = RequestState(tokens, page_table, sampling)
        if bucket.num_steps:
            run = partial(programs.decode, num_steps=bucket.num_steps)
        else:
            run = partial(programs.extend, num_tokens=bucket.num_tokens)
        rows, ids = rows[:, : programs.NUM_ROW_FIELDS], rows[:, programs.NUM_ROW_FIELDS :]
        asked = wanted and programs.Asked(wanted, ids, self._has_raw_logprobs)
        cache, state, told = run(model, cache, state, rows, asked=asked, kernels=self._kernels)
        # Sampling parameters only change when a request is installed: they are read here, not
        # donated.
        return cache, state.tokens, state.page_table, told

    def _placed(self, shapes: Any) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )


def _exact_float32(params: tuple[jax.ShapeDtypeStruct, ...]) -> AbstractContextManager:
    """GPUs multiply float32 in a shorter type by default; who asks for float32 wants it."""
    is_float32 = any(param.dtype == np.float32 for param in params)
    return jax.default_matmul_precision("highest") if is_float32 else nullcontext()
