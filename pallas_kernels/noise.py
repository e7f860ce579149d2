"""The randomness of sampling: a function of a request's seed, a token's position and nothing else.
XLA and the kernel of `sample.py` compute it by the same lines, so that they draw the same tokens.

Noise is drawn for groups of tokens. The largest of several logits that each got Gumbel noise of
their own is distributed as the logarithm of their summed exponentials plus one Gumbel noise
(Maddison et al. 2014, arXiv:1411.0030). So a draw from a softmax takes one noise per group to
choose a group, and then one per token to choose within it: a random number per `GROUP_SIZE` tokens
and no loss, where one per token would cost more than reading the logits.

Tokens `g, g + Q, g + 2 Q, ...` form group `g`, with `Q = ceil(V / GROUP_SIZE)` groups.

Source: Threefry-2x32 with 20 rounds, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"; it passes BigCrush from 13 rounds on.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

GROUP_SIZE = 16
OF_GROUPS, OF_TOKENS = 0, 1
"""What a noise is for: the second word of its counter. The first is the group, or the token."""

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)


def attempt_key(seed: tuple[Any, Any], position: Any, attempt: Any) -> tuple[Any, Any]:
    """The key of one attempt to draw the token at a position: uint32, any shape, like all here."""
    return threefry2x32(seed, (position.astype(jnp.uint32), attempt.astype(jnp.uint32)))


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two random words for each counter; distinct ones give independent words."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def exponential(key: tuple[Any, Any], index: Any, purpose: int) -> Any:
    """Standard exponential noise `E` of groups or tokens; `-log(E)` is Gumbel noise.

    It is -log(1 - u) for u uniform on a grid of 2**-32. Small `E` decides, and there u has all its
    bits: a token of probability 2**-30 still gets its due.
    """
    word, _ = threefry2x32(key, (index.astype(jnp.uint32), np.uint32(purpose)))
    u = (word.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24))
