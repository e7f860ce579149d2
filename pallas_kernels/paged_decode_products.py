"""What `paged_decode`'s kernel computes with: products, layouts and counters of a GPU, or plain
operations on a CPU. JAX's interpreters know neither products from registers nor layouts, so that
tests on a CPU have operations of their own; all else is the same kernel.

Scores and sums have a column for each query, and a row for each key, or for each element of a head.
"""

import inspect
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as gpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LAYOUT = plgpu.Layout.WGMMA
COLUMNS, ROWS = LAYOUT.reduce(0), LAYOUT.reduce(1)
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED  # what is stored with rows and columns exchanged


class Operations(Protocol):
    """Of one warpgroup. References are to shared memory, those of counters and `store` to global;
    `load` reads either."""

    def scores(self, k: Any, q: Any) -> jax.Array: ...  # k q'
    def add_values(self, sums: jax.Array, v: Any, weights: Any) -> jax.Array: ...
    def full(self, shape: tuple[int, ...], value: float) -> jax.Array: ...  # a matrix or columns
    def row_index(self, shape: tuple[int, ...]) -> jax.Array: ...
    def load(self, ref: Any) -> jax.Array: ...  # a matrix or columns
    def load_rows(self, ref: Any) -> jax.Array: ...  # one value a row
    def load_transposed(self, ref: Any) -> jax.Array: ...
    def store(self, ref: Any, value: jax.Array) -> None: ...
    def store_transposed(self, ref: Any, matrix: jax.Array) -> None: ...
    def copy(self, source: Any, target: Any) -> None: ...  # to other tiles
    def signal(self, counter: Any) -> None: ...
    def wait(self, counter: Any, count: jax.Array) -> None: ...


def over_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value a row, for all columns."""
    return lax.broadcast_in_dim(rows, shape, [0])


def over_rows(columns: jax.Array, like: jax.Array) -> jax.Array:
    """One value a column, for all rows."""
    return lax.broadcast_in_dim(columns, like.shape, [1])


class OnGpu(Operations):
    """For Mosaic GPU."""

    def scores(self, k: Any, q: Any) -> jax.Array:
        def multiply(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, k, q.T)
            return scores[...]

        return pl.run_scoped(
            multiply, plgpu.WGMMAAccumulatorRef((k.shape[0], q.shape[0]), jnp.float32)
        )

    def add_values(self, sums: jax.Array, v: Any, weights: Any) -> jax.Array:
        """sums + v' weights'."""
        multiply: Any = lambda sums: plgpu.wgmma(sums, v.T, weights.T)
        start: Any = plgpu.WGMMAAccumulatorRef.init(sums)
        return pl.run_state(multiply)(start)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), _layout(shape))

    def row_index(self, shape: tuple[int, ...]) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT)

    def load(self, ref: Any) -> jax.Array:
        return _load(ref, _layout(ref.shape))

    def load_rows(self, ref: Any) -> jax.Array:
        return _load(ref, ROWS)

    def load_transposed(self, ref: Any) -> jax.Array:
        return plgpu.layout_cast(_load(ref.T, TRANSPOSED), LAYOUT)

    def store(self, ref: Any, value: jax.Array) -> None:
        if (store := getattr(plgpu, "store", None)) is None:  # before JAX 0.12
            ref[...] = value
        else:
            store(ref, value, optimized=False)

    def store_transposed(self, ref: Any, matrix: jax.Array) -> None:
        ref.T[...] = plgpu.layout_cast(matrix, TRANSPOSED)

    def copy(self, source: Any, target: Any) -> None:
        target.T[...] = _load(source.T, TRANSPOSED)

    def signal(self, counter: Any) -> None:
        """Adds one to the counter, after all that this warpgroup has written."""

        def add_one(_: Any, counter: Any) -> None:
            gpu.warpgroup_barrier()
            gpu.SemaphoreRef(gpu.memref_ptr(counter)).signal(1, memory_scope="gpu")

        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        inline(add_one)(counter)

    def wait(self, counter: Any, count: jax.Array) -> None:
        """Until the counter is at `count`, and takes it back to zero."""

        def wait_and_subtract(_: Any, counter: Any, count: Any) -> None:
            semaphore = gpu.SemaphoreRef(gpu.memref_ptr(counter))
            semaphore.wait(count.registers.item(), memory_scope="gpu")

        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        inline(wait_and_subtract)(counter, count)


class Interpreted(Operations):
    """For JAX's interpreters, which run blocks one after another, so that none needs to wait."""

    def scores(self, k: Any, q: Any) -> jax.Array:
        return jnp.dot(k[...], q[...].T, preferred_element_type=jnp.float32)

    def add_values(self, sums: jax.Array, v: Any, weights: Any) -> jax.Array:
        product = jnp.dot(v[...].T, weights[...].T, preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # unlike those of tensor cores, these reads are unordered with copies
        return sums + product

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        return jnp.full(shape, value, jnp.float32)

    def row_index(self, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, shape, 0)

    def load(self, ref: Any) -> jax.Array:
        return ref[...]

    def load_rows(self, ref: Any) -> jax.Array:
        return ref[...]

    def load_transposed(self, ref: Any) -> jax.Array:
        return ref[...].T

    def store(self, ref: Any, value: jax.Array) -> None:
        ref[...] = value

    def store_transposed(self, ref: Any, matrix: jax.Array) -> None:
        ref[...] = matrix.T

    def copy(self, source: Any, target: Any) -> None:
        target[...] = source[...]

    def signal(self, counter: Any) -> None:
        pass

    def wait(self, counter: Any, count: jax.Array) -> None:
        pass


def _layout(shape: tuple[int, ...]) -> Any:
    return LAYOUT if len(shape) == 2 else COLUMNS


def _load(ref: Any, layout: Any) -> jax.Array:
    """JAX before 0.11 wants an index, which later ones deprecate."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    index = dict(idx=()) if index is not None and index.default is index.empty else {}
    return plgpu.load(ref, layout=layout, optimized=False, **index)


ON_GPU, INTERPRETED = OnGpu(), Interpreted()
