"""The sampling parameters of every running request as arrays on the device, and the one integer row
in which a request's parameters travel there. It knows of a field only which value means "off"."""

from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int, Int32, UInt32

from jaxengine.sampling_params import SamplingParams


class SamplingState(NamedTuple):
    """Sampling parameters of `R` rows: all slots, or those of one batch."""

    temperature: Float32[Array, " R"]  # 0 is greedy
    top_k: Int32[Array, " R"]  # a vocabulary's size or more is off
    top_p: Float32[Array, " R"]  # 1 is off
    min_p: Float32[Array, " R"]  # 0 is off
    frequency_penalty: Float32[Array, " R"]  # 0 is off
    presence_penalty: Float32[Array, " R"]  # 0 is off
    repetition_penalty: Float32[Array, " R"]  # 1 is off
    min_new_tokens: Int32[Array, " R"]
    prompt_lens: Int32[Array, " R"]
    seed: UInt32[Array, "R 2"]
    stop_ids: Int32[Array, "R E"]  # masked until min_new_tokens are out; padded with -1
    bias_ids: Int32[Array, "R M"]  # padded with an id beyond every vocabulary
    bias_values: Float32[Array, "R M"]


FLOAT_PARAMS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)

PROMPT_LEN = SamplingState._fields.index("prompt_lens")  # in a row; the seed's words are behind it
LARGEST = float(np.finfo(np.float32).max)
NO_TOKEN = np.iinfo(np.int32).max
"""An id that no vocabulary holds: a write there is dropped."""


def empty_state(slots: int, num_stop_ids: int, num_bias: int) -> SamplingState:
    """Rows that decode greedily and without any filter."""
    [row] = _neutral_row(num_stop_ids, num_bias)
    fields = (np.broadcast_to(field, (slots, *field.shape)) for field in row)
    return SamplingState(*map(jnp.array, fields))


def pack(
    params: SamplingParams,
    *,
    stop_ids: Collection[int],
    num_stop_ids: int,
    num_bias: int,
) -> np.ndarray:
    """One int32 row for `install`, but for what `of_request` enters: the fields of `SamplingState`
    in order, floats by their bits.

    `stop_ids` are all ids that end the request, end-of-sequence ids included. Raises ValueError if
    they or the biases exceed the room of the state.
    """
    biases = params.logit_bias or {}
    _refuse_overflow("stop_token_ids", len(stop_ids), num_stop_ids)
    _refuse_overflow("logit_bias", len(biases), num_bias)
    row = _neutral_row(num_stop_ids, num_bias).copy()
    for name in FLOAT_PARAMS:
        row[name] = _within_float32(getattr(params, name))
    if params.is_greedy:
        row["temperature"] = 0
    if params.top_k > 0:
        row["top_k"] = min(params.top_k, NO_TOKEN)
    row["min_new_tokens"] = min(params.min_new_tokens, NO_TOKEN)
    if stop_ids:
        row["stop_ids"][0, : len(stop_ids)] = list(stop_ids)
    if biases:
        row["bias_ids"][0, : len(biases)] = [int(token) for token in biases]
        row["bias_values"][0, : len(biases)] = list(map(_within_float32, biases.values()))
    return row.view(np.int32)


def of_request(packed: np.ndarray, *, prompt_len: int, seed: int) -> np.ndarray:
    """A copy of such a row, or of one with more behind it, for a request of its own. `seed` counts
    modulo 2**64."""
    row = packed.copy()
    words = row.view(np.uint32)
    words[PROMPT_LEN : PROMPT_LEN + 3] = prompt_len, seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF
    return row


def num_fields(state: SamplingState) -> int:
    """Length of a packed row."""
    return sum(field.size // field.shape[0] for field in state)


def install(
    state: SamplingState, slots: Int[Array, " I"], packed: Int32[Array, "I W"]
) -> SamplingState:
    """The state with rows of packed parameters in `slots`; one beyond the last changes nothing."""
    ends = np.cumsum([field[0].size for field in state])
    parts = jnp.split(packed, ends[:-1], axis=1)
    fields = []
    for field, part in zip(state, parts, strict=True):
        value = lax.bitcast_convert_type(part, field.dtype).reshape(-1, *field.shape[1:])
        fields.append(field.at[slots].set(value, mode="drop"))
    return SamplingState(*fields)


@cache
def _neutral_row(num_stop_ids: int, num_bias: int) -> np.ndarray:
    """One record of the fields of `SamplingState`, in order, where everything is off."""
    shapes: dict[str, Any] = dict(
        seed=("u4", (2,)),
        stop_ids=("i4", (num_stop_ids,)),
        bias_ids=("i4", (num_bias,)),
        bias_values=("f4", (num_bias,)),
    )
    names = SamplingState._fields
    scalars = dict.fromkeys(names, ("i4",)) | dict.fromkeys(FLOAT_PARAMS, ("f4",))
    row = np.zeros(1, [(name, *(scalars | shapes)[name]) for name in names])
    row["top_k"] = row["bias_ids"] = NO_TOKEN
    row["top_p"] = row["repetition_penalty"] = 1
    row["stop_ids"] = -1
    return row


def _refuse_overflow(name: str, count: int, room: int) -> None:
    if count > room:
        raise ValueError(f"{name}: expected at most {room} entries, got {count}; use fewer")


def _within_float32(value: float) -> float:
    """One too large for any float32 becomes the largest, not infinity."""
    return min(max(value, -LARGEST), LARGEST)
