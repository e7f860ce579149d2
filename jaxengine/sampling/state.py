"""The sampling parameters of every running request as arrays on the device, and the one integer row
in which a request's parameters travel there. It knows of a field only which value means "off"."""

from collections.abc import Collection
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

NO_TOKEN = np.iinfo(np.int32).max
"""An id that no vocabulary holds: a write there is dropped."""


def empty_state(slots: int, num_stop_ids: int, num_bias: int) -> SamplingState:
    """Rows that decode greedily and without any filter."""
    row = _neutral_row(num_stop_ids, num_bias)
    fields = (np.broadcast_to(field, (slots, *field.shape)) for field in row.values())
    return SamplingState(*map(jnp.array, fields))


def pack(
    params: SamplingParams,
    *,
    prompt_len: int,
    seed: int,
    stop_ids: Collection[int],
    num_stop_ids: int,
    num_bias: int,
) -> np.ndarray:
    """One int32 row for `install`: the fields of `SamplingState` in order, floats by their bits.

    `seed` counts modulo 2**64. `stop_ids` are all ids that end the request, end-of-sequence ids
    included. Raises ValueError if they or the biases exceed the room of the state.
    """
    biases = params.logit_bias or {}
    _refuse_overflow("stop_token_ids", len(stop_ids), num_stop_ids)
    _refuse_overflow("logit_bias", len(biases), num_bias)
    row = _neutral_row(num_stop_ids, num_bias)
    for name in FLOAT_PARAMS:
        row[name] = _float32(getattr(params, name))
    if params.is_greedy:
        row["temperature"] = np.float32(0)
    if params.top_k > 0:
        row["top_k"] = np.int32(min(params.top_k, NO_TOKEN))
    row["min_new_tokens"] = np.int32(min(params.min_new_tokens, NO_TOKEN))
    row["prompt_lens"] = np.int32(prompt_len)
    row["seed"][:] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF
    row["stop_ids"][: len(stop_ids)] = list(stop_ids)
    row["bias_ids"][: len(biases)] = [int(token) for token in biases]
    row["bias_values"][: len(biases)] = [_float32(bias) for bias in biases.values()]
    return np.concatenate([np.atleast_1d(field).view(np.int32) for field in row.values()])


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


def _neutral_row(num_stop_ids: int, num_bias: int) -> dict[str, Any]:
    """The fields of `SamplingState` for one row where everything is off."""
    row = dict.fromkeys(SamplingState._fields, np.int32(0)) | dict.fromkeys(
        FLOAT_PARAMS, np.float32(0)
    )
    return row | dict(
        top_k=np.int32(NO_TOKEN),
        top_p=np.float32(1),
        repetition_penalty=np.float32(1),
        seed=np.zeros(2, np.uint32),
        stop_ids=np.full(num_stop_ids, -1, np.int32),
        bias_ids=np.full(num_bias, NO_TOKEN, np.int32),
        bias_values=np.zeros(num_bias, np.float32),
    )


def _refuse_overflow(name: str, count: int, room: int) -> None:
    if count > room:
        raise ValueError(f"{name}: expected at most {room} entries, got {count}; use fewer")


def _float32(value: float) -> np.float32:
    """The nearest float32; one too large for any becomes the largest, not infinity."""
    limit = float(np.finfo(np.float32).max)
    return np.float32(min(max(value, -limit), limit))
