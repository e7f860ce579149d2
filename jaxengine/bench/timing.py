"""Times a device function, without a profiler: calls in a row on distinct buffers.

One compiled program calls the function once for each set of arguments. The sets together are larger
than any cache, and a barrier ties each call to the one before, so that nothing is read twice from a
cache, merged or run side by side. Programs are launched one behind the other and waited for once:
what launching costs the host is hidden behind the device as long as it takes less.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

LAUNCHES, ROUNDS = 5, 5
COLD_BYTES = 256 << 20  # of all sets together; the cache of an H200 holds 50 MB
MIN_SETS, MAX_SETS = 4, 48

Function = Callable[..., Any]


def num_sets(bytes_of_one: float) -> int:
    """Sets of arguments that no cache holds together, and few enough to compile."""
    return min(MAX_SETS, max(MIN_SETS, -(-COLD_BYTES // max(int(bytes_of_one), 1))))


def seconds_per_call(
    function: Function, sets: Sequence[tuple[Any, ...]], *, in_place: int | None = None
) -> float:
    """Median seconds of one call of `function(*arguments)` over sets of arguments.

    `in_place` is the index of an argument that is overwritten: it is donated, and the function
    returns what takes its place, and the rest. The caller's arrays of it are gone afterwards.
    """
    program = chained(function, sets, in_place)
    kept, others = _split(sets, in_place)
    kept, out = program(kept, others)
    jax.block_until_ready((kept, out))
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(LAUNCHES):
            kept, out = program(kept, others)
        jax.block_until_ready((kept, out))
        seconds.append((time.perf_counter() - started) / (LAUNCHES * len(sets)))
    return statistics.median(seconds)


def chained(function: Function, sets: Sequence[tuple[Any, ...]], in_place: int | None) -> Any:
    """One compiled program of a call for each set: (what is overwritten, all else) -> (what takes
    its place, results)."""

    def run(kept: list[Any], others: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
        anew: list[Any] = []
        results: list[Any] = []
        for index, args in enumerate(others):
            if results:  # no call begins before the last has ended
                first, results[-1] = jax.lax.optimization_barrier((args[0], results[-1]))
                args = (first, *args[1:])
            if in_place is None:
                results.append(function(*args))
                continue
            args = (*args[:in_place], kept[index], *args[in_place:])
            new, result = function(*args)
            anew.append(new)
            results.append(result)
        return anew, results

    kept, others = _split(sets, in_place)
    return jax.jit(run, donate_argnums=0).lower(kept, others).compile()


def _split(
    sets: Sequence[tuple[Any, ...]], in_place: int | None
) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """What is overwritten, and all else."""
    if in_place is None:
        return [], list(sets)
    return (
        [args[in_place] for args in sets],
        [(*args[:in_place], *args[in_place + 1 :]) for args in sets],
    )
