"""How many pages of KV cache a device has room for, from its memory and what the compiled steps
really use."""

import os
from typing import Any, NamedTuple

import jax

GIB = 1 << 30
CPU_FRACTION = 0.5  # of the host's memory: other programs live there too
DEVICE_FRACTION = 0.98  # of what the allocator may take; the rest is its fragmentation
LIBRARY_BYTES = 256 << 20  # cuBLAS workspaces and the like, outside the programs' own accounts


class Demand(NamedTuple):
    """Bytes that are spoken for before the pool gets any."""

    others: int  # of the process, there before the engine
    weights: int
    state: int  # request state by slot
    steps: int  # the largest temporary any compiled step takes


def device_bytes(device: Any) -> int:
    """Memory the process may use on `device`, in bytes."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * CPU_FRACTION)


def bytes_in_use(device: Any) -> int:
    """Memory that the process has taken on `device` already, where that is known."""
    return int((device.memory_stats() or {}).get("bytes_in_use", 0))


def step_bytes(executable: Any) -> int:
    """Temporary memory of a compiled step, with its code and the outputs that alias no input."""
    analysis = executable.memory_analysis()
    outputs = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    return analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes + outputs


def num_pages_that_fit(
    device: Any, demand: Demand, page_bytes: int, *, mem_fraction_static: float | None
) -> int:
    """Pages of `page_bytes` (all layers) that fit beside `demand`.

    `mem_fraction_static` is the share of the device's memory for weights and pool together; None
    takes what the steps leave.

    Raises:
        ValueError: not a single page fits; the message has the numbers.
    """
    total = device_bytes(device)
    spoken_for = sum(demand) + LIBRARY_BYTES
    room = int(total * DEVICE_FRACTION) - spoken_for
    if mem_fraction_static is not None:
        room = min(room, int(total * mem_fraction_static) - demand.weights)
    if room < page_bytes:
        raise ValueError(
            f"no memory left for the KV cache: the device offers {total / GIB:.2f} GiB, of which "
            f"{demand.others / GIB:.2f} are in use for other things, weights take "
            f"{demand.weights / GIB:.2f}, request state {demand.state / GIB:.2f}, the largest step "
            f"{demand.steps / GIB:.2f}; raise mem_fraction_static ({mem_fraction_static}), or "
            "lower chunked_prefill_size, max_running_requests or context_length"
        )
    return room // max(page_bytes, 1)  # an encoder keeps nothing in its pages


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
