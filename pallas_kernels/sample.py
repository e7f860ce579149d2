"""One token for each row of logits: the likeliest, or drawn from what top-k, top-p and min-p keep.

    token = argmax(logits)                                     where the temperature is 0
    token ~ exp(logits / temperature) over what is kept        elsewhere

A first kernel reads the rows in several parts each, so that a single row fills the chip too. A part
yields its largest logit, the sum of its exponentials, and a group of tokens drawn in proportion to
theirs: `noise.py` tells how, at one random number for 16 logits. A second kernel, one program for
each row, puts the parts together and draws a token of the group.

With top-k or top-p that is an attempt. One more pass over the row finds how many tokens lie above
the drawn one and how probable they are, so whether the filters keep it. What drops a token drops
all that lie no higher: so the same pass draws from those above, in case they are needed, and goes
on until a token is kept. An attempt succeeds with the probability of what the filters keep, or
better. Each row does so by itself.

Bytes moved: 4 V for each row, and 4 V for each attempt that has to be tested, from the GPU's cache
as far as that holds the logits. It is compared with `jaxengine.sampling.draw`, which shares the
noise with it and nothing else.

Sources: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; Gumbel noise for sets and
then their elements, Maddison et al. 2014, arXiv:1411.0030; rejection instead of sorting,
FlashInfer's blog, "Sorting-Free GPU Kernels for LLM Sampling", 2025, which draws by inversion.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float32, Int, Int32, UInt32

from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.noise import (
    GROUP_SIZE,
    OF_GROUPS,
    OF_TOKENS,
    attempt_key,
    exponential,
)

UNUSABLE = -1
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: its difference to itself is not NaN
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
NOWHERE = jnp.iinfo(jnp.int32).max
MANY_ROWS = 1024  # up to so many, kernels of as many parts are the same


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning: none of it changes a result beyond rounding."""

    programs: int = 528  # parts of rows that fill a chip: 4 for each of 132 cores
    max_parts: int = 32  # of a row
    part_groups: int = 256  # groups at a time
    part_warps: int = 4
    row_groups: int = 1024
    row_warps: int = 32

    def parts(self, B: int, Q: int) -> int:
        """Parts of each row: a power of two, each with something to do."""
        parts = min(self.max_parts, self.programs // B, pl.cdiv(Q, self.part_groups))
        return 1 << (max(1, parts).bit_length() - 1)


class Sums(NamedTuple):
    """Of the tokens seen so far: in the kernels by lane, `J` of them, then of a part or a row."""

    top: Any  # the largest logit
    mass: Any  # sum of exp((logit - top) / temperature); NaN if a logit was NaN or +inf
    score: Any  # the best group's noisy logarithm of mass, base 2; greedily: the largest logit
    choice: Any  # the group of that score; greedily: the token


def sample_rows(
    logits: Float32[Array, "B V"],
    *,
    temperature: Float32[Array, " B"],
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    min_p: Float32[Array, " B"],
    seed: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    config: Config | None = None,
    interpret: bool = False,
) -> Int32[Array, " B"]:
    """The next token of each row; the first of the largest where the temperature is 0.

    Off are: a `top_k` of V or more, a `top_p` of 1, a `min_p` of 0. The draw is a function of
    the row's logits, parameters, seed and position. A row gives -1 if its logits hold NaN or +inf
    or are all -inf.
    """
    config = Config() if config is None else config
    B, V = logits.shape
    S = config.parts(B, pl.cdiv(V, GROUP_SIZE))
    of_parts = jax.ShapeDtypeStruct((B, S), jnp.float32)
    sums = (of_parts, of_parts, of_parts, jax.ShapeDtypeStruct((B, S), jnp.int32))
    tokens = (jax.ShapeDtypeStruct((B,), jnp.int32),)
    how: Any = dict(length=MANY_ROWS, interpret=interpret)
    parts = lowered_once(_parts_kernel, config, results=sums, **how)(
        temperature, seed, positions, logits
    )
    (drawn,) = lowered_once(_rows_kernel, config, results=tokens, **how)(
        temperature, top_k, top_p, min_p, seed, positions, *parts, logits
    )
    return drawn


def _parts_kernel(
    config: Config, sums: tuple[jax.ShapeDtypeStruct, ...], interpret: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """The call (temperature, seed, positions, logits) -> `Sums` of the parts, [B S] each."""
    return pl.pallas_call(
        partial(_first_attempt, J=config.part_groups),
        grid=sums[0].shape,
        out_shape=sums,
        compiler_params=pltriton.CompilerParams(num_warps=config.part_warps, num_stages=1),
        interpret=interpret,
        name="sample_parts",
    )


def _rows_kernel(
    config: Config, tokens: tuple[jax.ShapeDtypeStruct], interpret: bool
) -> Callable[..., tuple[jax.Array]]:
    """The call (temperature, top_k, top_p, min_p, seed, positions, *parts, logits) -> tokens."""
    return pl.pallas_call(
        partial(_finish, J=config.row_groups),
        grid=tokens[0].shape,
        out_shape=tokens,
        compiler_params=pltriton.CompilerParams(num_warps=config.row_warps, num_stages=1),
        interpret=interpret,
        name="sample_rows",
    )


def _first_attempt(
    temperature_ref: Any,
    seed_ref: Any,
    positions_ref: Any,
    logits_ref: Any,
    *part_refs: Any,
    J: int,
) -> None:
    """All about one part of one row."""
    row, part = pl.program_id(0), pl.program_id(1)
    tiles, S = _num_tiles(logits_ref, J), part_refs[0].shape[1]
    first, last = part * tiles // S, (part + 1) * tiles // S
    temperature = temperature_ref[row]

    def draw() -> Sums:
        key = _key(seed_ref, positions_ref, row, 0)
        scale = _scale(temperature)

        def add_tile(tile: Any, sums: Sums) -> Sums:
            logits, groups = _read(logits_ref, row, tile, J)
            top = reduce(jnp.maximum, logits, sums.top)
            return _add_groups(sums, top, logits, groups, key, scale)

        return _over_lanes(lax.fori_loop(first, last, add_tile, _no_sums(J)), scale)

    def find() -> Sums:
        def add_tile(tile: Any, sums: Sums) -> Sums:
            logits, groups = _read(logits_ref, row, tile, J)
            return _add_tokens(sums, logits, groups, logits_ref.shape[1])

        return _over_lanes(lax.fori_loop(first, last, add_tile, _no_sums(J)), 0.0)

    for ref, value in zip(part_refs, lax.cond(temperature > 0, draw, find), strict=True):
        ref[row, part] = value


def _finish(
    temperature_ref: Any,
    top_k_ref: Any,
    top_p_ref: Any,
    min_p_ref: Any,
    seed_ref: Any,
    positions_ref: Any,
    *refs: Any,
    J: int,
) -> None:
    """Puts the parts of a row together and draws until the filters keep what is drawn."""
    *part_refs, logits_ref, out_ref = refs
    row, V = pl.program_id(0), logits_ref.shape[1]
    temperature, top_k, top_p = temperature_ref[row], top_k_ref[row], top_p_ref[row]
    scale = jnp.where(temperature > 0, _scale(temperature), 0)
    first = _over_lanes(Sums(*(ref[row, :] for ref in part_refs)), scale)
    is_usable = (first.mass > 0) & (first.score > -jnp.inf)
    out_ref[row] = jnp.where(is_usable, first.choice, UNUSABLE)

    @pl.when(is_usable & (temperature > 0))
    def _() -> None:
        looks_above = (top_k < V) | (top_p < 1)
        max_above = jnp.where(top_k < V, top_k - 1, V)
        max_mass = jnp.where(top_p < 1, top_p * first.mass, jnp.inf)
        floor = first.top + temperature * jnp.log(min_p_ref[row])

        def try_again(last: Any) -> Any:
            """Ends with the last token if the filters keep it, else with one from above it."""
            number, token, logit, _ = last
            key = _key(seed_ref, positions_ref, row, number + 1)
            counts = lambda logits: (logits > logit) & (logits >= floor)
            above, count = _add_up(logits_ref, row, J, counts, first.top, key, scale)
            # What min-p drops is missing from the sums only if it drops this token too.
            is_kept = (count <= max_above) & (above.mass <= max_mass) & (logit >= floor)
            new = _pick(logits_ref, row, above, counts, key, scale)
            token, logit = (
                jnp.where(is_kept, *both) for both in zip((token, logit), new, strict=True)
            )
            return number + 1, token, logit, ~is_kept & looks_above

        key = _key(seed_ref, positions_ref, row, 0)
        token, logit = _pick(logits_ref, row, first, lambda x: x > -jnp.inf, key, scale)
        attempt = jnp.int32(0), token, logit, looks_above | (logit < floor)
        _, token, _, _ = lax.while_loop(lambda last: last[3], try_again, attempt)
        out_ref[row] = token


def _add_up(
    logits_ref: Any, row: Any, J: int, counts: Callable, top: Any, key: Any, scale: Any
) -> tuple[Sums, Any]:
    """Of the tokens of a row that count: the sums, with a group drawn from them, and the number."""

    def add_tile(tile: Any, carry: tuple[Sums, Any]) -> tuple[Sums, Any]:
        sums, count = carry
        logits, groups = _read(logits_ref, row, tile, J)
        counted = [counts(values) for values in logits]
        logits = [jnp.where(*pair, -jnp.inf) for pair in zip(counted, logits, strict=True)]
        count += reduce(add, [c.astype(jnp.int32) for c in counted])
        return _add_groups(sums, sums.top, logits, groups, key, scale), count

    nothing = _no_sums(J)._replace(top=jnp.full(J, top)), jnp.zeros(J, jnp.int32)
    sums, count = lax.fori_loop(0, _num_tiles(logits_ref, J), add_tile, nothing)
    return _over_lanes(sums, scale), jnp.sum(count)


def _pick(
    logits_ref: Any, row: Any, sums: Sums, counts: Callable, key: Any, scale: Any
) -> tuple[Any, Any]:
    """A token drawn from those of the chosen group that count, and its logit."""
    V, Q = logits_ref.shape[1], _num_groups(logits_ref)
    group = jnp.minimum(sums.choice, Q - 1)
    tokens = group + Q * jnp.arange(GROUP_SIZE, dtype=jnp.int32)
    logits = logits_ref[row, jnp.minimum(tokens, V - 1)]
    logits = jnp.where((tokens < V) & counts(logits), logits, -jnp.inf)
    noisy = (logits - sums.top) * scale - jnp.log2(exponential(key, tokens, OF_TOKENS))
    token = jnp.min(jnp.where(noisy == jnp.max(noisy), tokens, NOWHERE))
    return token, jnp.max(jnp.where(tokens == token, logits, -jnp.inf))


def _num_groups(logits_ref: Any) -> int:
    return pl.cdiv(logits_ref.shape[1], GROUP_SIZE)


def _num_tiles(logits_ref: Any, J: int) -> int:
    return pl.cdiv(_num_groups(logits_ref), J)


def _key(seed_ref: Any, positions_ref: Any, row: Any, number: Any) -> tuple[Any, Any]:
    seed = seed_ref[row, 0], seed_ref[row, 1]
    return attempt_key(seed, positions_ref[row], jnp.asarray(number, jnp.int32))


def _scale(temperature: Any) -> Any:
    """What to multiply logits by before exp2; positive, so that -inf stays -inf."""
    return jnp.maximum(math.log2(math.e) / temperature, SMALLEST)


def _no_sums(J: int) -> Sums:
    zeros = jnp.zeros(J, jnp.float32)
    return Sums(zeros + LOWEST, zeros, zeros - jnp.inf, jnp.full(J, NOWHERE, jnp.int32))


def _read(logits_ref: Any, row: Any, tile: Any, J: int) -> tuple[list[Any], Any]:
    """The logits of `J` groups, the first of each, the second of each, and so on; the groups."""
    V, Q = logits_ref.shape[1], _num_groups(logits_ref)
    groups = tile * J + jnp.arange(J, dtype=jnp.int32)
    logits = []
    for place in range(GROUP_SIZE):
        is_real = (groups < Q) & (groups + place * Q < V)
        block = logits_ref.at[row, pl.ds(tile * J + place * Q, J)]
        logits.append(pltriton.load(block, mask=is_real, other=-jnp.inf))
    return logits, groups


def _add_groups(sums: Sums, top: Any, logits: list[Any], groups: Any, key: Any, scale: Any) -> Sums:
    """The sums with one more group in each lane; `top` is the largest logit with these."""
    shrink = (sums.top - top) * scale
    mass = reduce(add, [jnp.exp2((values - top) * scale) for values in logits])
    score = jnp.log2(mass) - jnp.log2(exponential(key, groups, OF_GROUPS))
    old_score = sums.score + shrink
    is_better = score > old_score
    return Sums(
        top,
        sums.mass * jnp.exp2(shrink) + mass,
        jnp.where(is_better, score, old_score),
        jnp.where(is_better, groups, sums.choice),
    )


def _add_tokens(sums: Sums, logits: list[Any], groups: Any, V: int) -> Sums:
    """The sums of a greedy row with one more group in each lane; mass counts these."""
    mass, score, choice = sums.mass + 1, sums.score, sums.choice
    for place, values in enumerate(logits):
        tokens = groups + place * pl.cdiv(V, GROUP_SIZE)
        is_better = (values > score) | ((values == score) & (tokens < choice))
        score, choice = jnp.where(is_better, values, score), jnp.where(is_better, tokens, choice)
        mass = jnp.where(values < jnp.inf, mass, jnp.nan)
    return Sums(sums.top, mass, score, choice)


def _over_lanes(sums: Sums, scale: Any) -> Sums:
    """Of all lanes together; of equal scores the smallest choice."""
    top = jnp.max(sums.top)
    shrink = (sums.top - top) * scale
    scores = sums.score + shrink
    score = jnp.max(scores)
    choice = jnp.min(jnp.where(scores == score, sums.choice, NOWHERE))
    return Sums(top, jnp.sum(sums.mass * jnp.exp2(shrink)), score, choice)


def unsupported(*, dtype: str) -> str | None:
    """Why logits of this dtype cannot be used; None if they can."""
    return None if dtype == "float32" else f"it takes float32 logits, not {dtype}"


class Shape(NamedTuple):
    """Logits of one step of a production model."""

    B: int
    V: int


SHAPES = {
    f"{model} {B}": Shape(B, V)
    for model, V in {"llama-3.1": 128256, "qwen2.5 and qwen3": 151936}.items()
    for B in (1, 8, 32, 128, 256)
}
