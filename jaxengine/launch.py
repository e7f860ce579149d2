"""A launch of the device as the programs see it: the rows it is given, what it is made for, and
what the host reads of it."""

from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int

from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.hidden_states import WantedStates
from jaxengine.logprobs import Told, Wanted
from jaxengine.pallas_kernels.dispatch import XLA, Kernels
from jaxengine.request_state import RequestState, Settings
from jaxengine.step_plan import MAX_UNSENT

NUM_ROW_FIELDS = 7


class RowInputs(NamedTuple):
    """The whole host input of a launch, `[B, NUM_ROW_FIELDS]` when packed; padding rows have
    `query_lens` 0."""

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]  # position of the first query token
    query_lens: Int[Array, " B"]
    new_pages: Int[Array, " B"]  # the next page that the row comes to need; 0 for none
    num_draws: Int[Array, " B"]  # tokens to draw and to append; 0 inside of a prompt
    write_starts: Int[Array, " B"]  # the first position whose K and V are not in the cache yet
    tell_starts: Int[Array, " B"]  # the first position that tells of the prompt's token behind it


class States(NamedTuple):
    """Hidden states at `n` places of the forward pass."""

    last: Float[Array, "steps n B D"]  # of each row's last token
    of_inputs: Float[Array, "n T D"] | None  # of all tokens


class Outputs(NamedTuple):
    """What the host reads of a launch."""

    drawn: Int[Array, "steps B"]  # -1 where logits are not finite
    of_drawn: Told | None = None  # of [steps B], where wanted
    of_inputs: Told | None = None  # of [T]: at each token that tells, of the one behind it
    states: States | None = None
    embeddings: Float32[Array, "B E"] | None = None


class Asked(NamedTuple):
    """What is wanted to know of distributions."""

    wanted: Wanted  # static
    ids: Int[Array, "B n"]  # tokens that each row asks about
    is_raw: bool  # of drawn tokens: of the model's own logits, before any adjustment; static


Part = Literal["whole", "read", "draw", "adjust", "choose", "embed"]


class Variant(NamedTuple):
    """Which program for a launch size: a whole step, the part of one before the host's say on what
    may be drawn or the part behind it, itself in two where the host has its say on logits, or one
    that embeds; and what it tells."""

    part: Part = "whole"
    wanted: Wanted | None = None
    states: WantedStates | None = None

    @property
    def num_fields(self) -> int:
        """Of a packed row."""
        return NUM_ROW_FIELDS + self._num_new + (self.wanted.ids if self.wanted else 0)

    def second(self, part: Part) -> "Variant":
        """Behind the host's say in a step of which this is the first part."""
        return self._replace(part=part, states=None)

    def split(self, packed_rows: Any) -> tuple[Any, Any, Any]:
        """What packed rows consist of: the fields of `RowInputs`; in a step that pauses the tokens
        that they bring along, behind -1; the ids that they ask about."""
        end = NUM_ROW_FIELDS + self._num_new
        return (
            packed_rows[:, :NUM_ROW_FIELDS],
            packed_rows[:, NUM_ROW_FIELDS:end],
            packed_rows[:, end:],
        )

    @property
    def _num_new(self) -> int:
        return 0 if self.part in ("whole", "embed") else MAX_UNSENT

    @property
    def structure(self) -> tuple[Any, ...]:
        """What it gives beside cache and state, with some leaf in place of each array."""
        some: Any = 0
        told = None if self.wanted is None else Told(some, some, some, some)
        of_inputs = told if self.wanted is not None and self.wanted.of_inputs else None
        seen = self.states and States(some, some if self.states.of_inputs else None)
        match self.part:
            case "adjust":
                return (some,)
            case "draw" | "choose":
                return (Outputs(some, told),)
            case "read":
                return some, Outputs(some, None, of_inputs, seen)
            case "embed":
                return (Outputs(some, embeddings=some),)
        return (Outputs(some, told, of_inputs, seen),)


class Options(NamedTuple):
    """What a program is made for, beside its size."""

    asked: Asked | None = None
    states: WantedStates | None = None  # static
    functions: Functions = NO_FUNCTIONS
    kernels: Kernels = XLA


PLAIN = Options()


def unpacked(packed_rows: Int[Array, "B fields"]) -> RowInputs:
    return RowInputs(*(packed_rows[:, field] for field in range(NUM_ROW_FIELDS)))


def of_rows(state: RequestState, rows: RowInputs) -> tuple[Int[Array, "B P"], Settings]:
    settings = jax.tree.map(lambda leaf: leaf[rows.slots], state.settings)
    return state.page_table[rows.slots], settings
