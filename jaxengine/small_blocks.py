"""Keeps the temporary memory of steps where it is, from launch to launch.

A CUDA graph holds addresses; where those of a step's temporary memory change, all of its kernels
are set anew, and the launch takes a millisecond instead of a fifth. The allocator gives each array
the smallest free block that holds it. So the uploads and results that come and go with each launch
get small blocks of their own, free among others that stay; else they would be cut from the large
free block, which thereby begins now here, now there.
"""

from typing import Any

import jax
import numpy as np

LEAST, MOST = 256, 1 << 16  # bytes; what the allocator rounds to, and the last of its classes here
COUNT = 4  # arrays of about one size that are there at a time: two launches, before and after


def small_blocks(device: Any, mask_bytes: int) -> list[jax.Array]:
    """What stays. `mask_bytes` is the size of the largest array that is uploaded."""
    if device.platform == "cpu":
        return []
    sizes = [1 << shift for shift in range(LEAST.bit_length() - 1, MOST.bit_length())]
    blocks = [
        jax.device_put(np.zeros(size, np.uint8), device)
        for size in (*sizes, mask_bytes)
        for _ in range(2 * COUNT)
    ]
    jax.block_until_ready(blocks)
    for block in blocks[::2]:
        block.delete()
    return blocks[1::2]
