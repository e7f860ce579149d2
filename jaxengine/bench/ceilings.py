"""What the device reaches at best, measured in about two seconds: a pure read of memory, and one
large product. It knows nothing of models.

The read is the row sums of an array much larger than any cache, the product that of two square
matrices of random numbers; random, because multiplying zeros takes less power and runs faster. Each
program repeats its work, so that launching it does not count, and the best run is taken. It is not
a loop, as XLA would copy what a loop hands on.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.bench.floors import Ceilings

GPU_READ, CPU_READ = 2 << 30, 32 << 20  # bytes of the array that is read
GPU_SIDE, CPU_SIDE = 8192, 512  # of the matrices
READS, PRODUCTS, RUNS = 8, 6, 4
ROWS = 1024, 8192  # numbers that one sum reads; which is faster depends on the device
WAY_OUT = "give both --bandwidth and --flops to do without measuring"


def measure(device: Any) -> Ceilings:
    """The ceilings of `device`, which must have nothing else to do.

    Takes about 2 GiB of its memory, less where less is free; all of it is given back.

    Raises:
        ValueError: there is too little memory left to measure.
    """
    is_cpu = device.platform == "cpu"
    side, dtype = (CPU_SIDE, jnp.float32) if is_cpu else (GPU_SIDE, jnp.bfloat16)
    try:
        with jax.default_device(device):
            bandwidth = read_rate(CPU_READ if is_cpu else _room(device))
            return Ceilings(bandwidth, product_rate(side, dtype))
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the ceilings cannot be measured: {error}; {WAY_OUT}") from error


def read_rate(num_bytes: int) -> float:
    """Bytes a second of reading an array of so many bytes."""
    rates = []
    for row in ROWS:
        make = jax.jit(jax.random.uniform, static_argnums=1)
        numbers = make(jax.random.key(0), (num_bytes // (4 * row), row))
        program = jax.jit(partial(_read, times=READS)).lower(numbers).compile()
        seconds = best(lambda: program(numbers))  # noqa: B023 - called at once
        rates.append(READS * numbers.nbytes / seconds)
        numbers.delete()
    return max(rates)


def product_rate(side: int, dtype: Any) -> float:
    """Operations a second of a product of two `side` by `side` matrices."""
    make = jax.jit(lambda key: jax.random.normal(key, (side, side), dtype))
    left, right = map(make, jax.random.split(jax.random.key(0)))
    right = jax.jit(lambda matrix: matrix * side**-0.5)(right)  # keeps the size of the entries
    program = jax.jit(partial(_multiply, times=PRODUCTS)).lower(left, right).compile()
    seconds = best(lambda: program(left, right))
    return PRODUCTS * 2 * side**3 / seconds


def best(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Least wall time of `run`, in seconds, after one run that does not count."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _read(numbers: Float[Array, "rows columns"], times: int) -> Float[Array, " rows"]:
    least = jnp.zeros((), numbers.dtype)
    for _ in range(times):
        sums = jnp.sum(jnp.maximum(numbers, least), axis=1)
        least = sums[0] * 1e-9  # each time waits for the one before: else they would be merged
    return sums


def _multiply(
    left: Float[Array, "side side"], right: Float[Array, "side side"], times: int
) -> Float[Array, "side side"]:
    for _ in range(times):
        left = left @ right
    return left


def _room(device: Any) -> int:
    """Bytes of the array to read: a third of what is free, as the products follow."""
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    room = min(GPU_READ, free // 3)
    if room < GPU_READ // 16:
        raise ValueError(
            f"the ceilings cannot be measured: {free >> 20} MiB of the device's memory are free; "
            f"lower --mem-fraction-static, or {WAY_OUT}"
        )
    return room
