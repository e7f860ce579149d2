"""What the device remembers of each slot's request, and the program that puts a request there."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxengine.functions import NO_FUNCTIONS, Choices, Functions
from jaxengine.models.interface import rows_of
from jaxengine.sampling import SamplingState, empty_state, num_fields
from jaxengine.sampling import install as install_sampling


class Settings(NamedTuple):
    """How each is to be continued; changed by `install` alone."""

    sampling: SamplingState
    choices: Choices  # among registered functions


class RequestState(NamedTuple):
    """By slot; the last slot belongs to padding rows."""

    tokens: Int[Array, "R C"]  # prompt and drawn tokens, in order of position
    page_table: Int[Array, "R P"]
    memory: PyTree  # what registered functions keep of each; [R, ...]
    settings: Settings


class InstallInputs(NamedTuple):
    """What goes into the slots of newly admitted requests, and a stretch of each one's tokens.

    The tokens travel flat, one row's behind the other's. A row without a request has no tokens, and
    a slot that does not exist.
    """

    slots: Int[Array, " I"]
    starts: Int[Array, " I"]  # position of the first token
    num_tokens: Int[Array, " I"]
    settings: Int[Array, "I fields"]  # what `sampling.pack` makes, then what `Functions.pack` does
    page_table: Int[Array, "I P"]
    tokens: Int[Array, " F"]


def empty_request_state(
    num_slots: int,
    context_length: int,
    page_size: int,
    *,
    num_stop_ids: int,
    num_bias: int,
    functions: Functions = NO_FUNCTIONS,
) -> RequestState:
    """With nothing in it; the padding slot comes on top of `num_slots`."""
    num_pages = -(-context_length // page_size)
    memory, choices = functions.empty(num_slots + 1)
    return RequestState(
        tokens=jnp.zeros((num_slots + 1, context_length), jnp.int32),
        page_table=jnp.zeros((num_slots + 1, num_pages), jnp.int32),
        memory=memory,
        settings=Settings(empty_state(num_slots + 1, num_stop_ids, num_bias), choices),
    )


def install(
    state: RequestState, new: InstallInputs, *, functions: Functions = NO_FUNCTIONS
) -> RequestState:
    """Fills slots. A history too long for one call comes in several, which all fill the slot."""
    row_ids = rows_of(new.num_tokens, len(new.tokens))
    row = jnp.minimum(row_ids, len(new.slots) - 1)
    offset = (
        jnp.arange(len(new.tokens), dtype=jnp.int32)
        - (jnp.cumsum(new.num_tokens) - new.num_tokens)[row]
    )
    slot = jnp.where(row_ids < len(new.slots), new.slots[row], len(state.tokens))
    sampling, choices = state.settings
    width = num_fields(sampling)
    memory, choices = functions.install(state.memory, choices, new.slots, new.settings[:, width:])
    return RequestState(
        tokens=state.tokens.at[slot, new.starts[row] + offset].set(new.tokens, mode="drop"),
        page_table=state.page_table.at[new.slots].set(new.page_table, mode="drop"),
        memory=memory,
        settings=Settings(install_sampling(sampling, new.slots, new.settings[:, :width]), choices),
    )
