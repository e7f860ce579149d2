"""The functions registered with an engine: how they are checked, what the device remembers for
them, and their part of a step. It knows rows and slots, no requests.

A step computes those that some row has chosen, for all rows; each row keeps what the ones of its
own choice have made of it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PyTree

from jaxengine.function_params import as_words, defaults_of, from_words, value_of
from jaxengine.models.interface import Batch
from jaxengine.models.taps import IN_LAYERS, Edit, Place
from jaxengine.sampling.extensions import (
    Function,
    Intervention,
    LogitsProcessor,
    Row,
    Sampler,
    Token,
)
from jaxengine.sampling.sample import UNUSABLE
from jaxengine.sampling_params import SamplingParams

SAMPLER = "sampler"  # its name among the functions


class Choices(NamedTuple):
    """What each row, or slot, has chosen."""

    is_chosen: dict[str, Bool[Array, " R"]]
    params: dict[str, dict[str, Array]]  # of each function, by name; [R, ...]


class Functions:
    """All of one engine, by name. False where there are none."""

    def __init__(
        self,
        processors: Mapping[str, LogitsProcessor] | None = None,
        sampler: Sampler | None = None,
        interventions: Mapping[str, Intervention] | None = None,
    ):
        self.processors = dict(processors or {})
        self.sampler = sampler
        self.interventions = dict(interventions or {})
        samplers = {} if sampler is None else {SAMPLER: sampler}
        self.of_logits: dict[str, LogitsProcessor] = self.processors | samplers
        self._all: dict[str, Function] = {**self.of_logits, **self.interventions}
        self.defaults = {name: defaults_of(name, each) for name, each in self._all.items()}

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def num_fields(self) -> int:
        """Length of a packed row."""
        return len(self.pack((), {}))

    def remembers(self, chosen: Collection[str]) -> bool:
        """Whether those chosen, or the sampler, keep something of each token drawn."""
        drawing = (each for name, each in self.of_logits.items() if name in (*chosen, SAMPLER))
        return any(each.init is not None for each in drawing)

    # What the device remembers

    def empty(self, num_slots: int) -> tuple[PyTree, Choices]:
        """The memory of every slot, and its choices: none."""
        return self._unpack(jnp.asarray(np.tile(self.pack((), {}), (num_slots, 1))))

    def pack(self, chosen: Collection[str], custom_params: Mapping[str, Any]) -> Int32[Any, " W"]:
        """One int32 row for `install`.

        Raises:
            ValueError: a value of another shape or kind than its default.
        """
        words = [np.array([name in chosen for name in self._all], np.int32)]
        for name, defaults in self.defaults.items():
            for param, default in defaults.items():
                value = default
                if param in custom_params and (name in chosen or name == SAMPLER):
                    value = value_of(param, custom_params[param], default)
                words.append(np.atleast_1d(as_words(value)).ravel())
        return np.concatenate(words)

    def check(self, sampling: SamplingParams, *, is_strict: bool = True) -> None:
        """Raises ValueError for a function that there is not, a parameter that no chosen function
        has (if it `is_strict`), and a value of another shape or kind."""
        given = (
            ("logits_processors", sampling.logits_processors or (), self.processors),
            ("interventions", sampling.interventions or (), self.interventions),
        )
        for field, names, there in given:
            for name in names:
                if name not in there:
                    raise ValueError(
                        f"{field}: none is registered as {name!r}; expected some of "
                        f"{', '.join(there) or 'none, as Engine() was given none'}"
                    )
        chosen, custom_params = sampling.functions, sampling.custom_params or {}
        known = {p for name in [*chosen, SAMPLER] for p in self.defaults.get(name, {})}
        for param in custom_params:
            if is_strict and param not in known:
                way_out = f"expected some of {', '.join(sorted(known))}"
                if not known:
                    way_out = "choose one in logits_processors or interventions"
                raise ValueError(
                    f"custom_params: none of the chosen functions has a parameter {param!r}; "
                    + way_out
                )
        if custom_params:
            self.pack(chosen, custom_params)

    def install(
        self,
        memory: PyTree,
        choices: Choices,
        slots: Int[Array, " I"],
        packed: Int32[Array, "I W"],
    ) -> tuple[PyTree, Choices]:
        """Memory and choices with those of packed rows in `slots`."""
        put = lambda all_rows, rows: all_rows.at[slots].set(rows, mode="drop")
        return jax.tree.map(put, (memory, choices), self._unpack(packed))

    def _unpack(self, packed: Int32[Array, "I W"]) -> tuple[PyTree, Choices]:
        is_chosen = {name: packed[:, i] != 0 for i, name in enumerate(self._all)}
        params: dict[str, dict[str, Array]] = {}
        start = len(self._all)
        for name, defaults in self.defaults.items():
            params[name] = {}
            for param, default in defaults.items():
                words = packed[:, start : start + default.size]
                params[name][param] = from_words(words, default.dtype, default.shape)
                start += default.size
        memory = {
            name: each.over_rows(each.init)(params[name])
            for name, each in self.of_logits.items()
            if each.init is not None
        }
        return memory, Choices(is_chosen, params)

    # Their part of a step

    def edits(
        self, batch: Batch, choices: Choices, num_layers: int
    ) -> list[tuple[Collection[Place], Edit]]:
        """What the interventions do to the activations of a batch."""
        return [
            (places_of(each, num_layers), _edit(each, name, batch, choices))
            for name, each in self.interventions.items()
        ]

    def choose(
        self,
        logits: Float32[Array, "B V"],
        see: Callable[[], Row],
        choices: Choices,
        memory: PyTree,
        draw: Callable[[Float32[Array, "B V"]], Int32[Array, " B"]],
    ) -> tuple[Float32[Array, "B V"], Int32[Array, " B"], PyTree]:
        """The logits processed, a token of each row, drawn with `draw` unless there is a sampler,
        and what is to be remembered of the rows."""
        if not self.of_logits:  # nor is it traced what they would see
            return logits, draw(logits), memory
        rows, memory = see(), dict(memory)
        for name, each in self.processors.items():
            given = logits, choices.params[name], rows
            is_chosen = choices.is_chosen[name]
            logits, memory = _made_where(is_chosen, name, each, given, logits, memory)
        drawn = draw(logits)
        if self.sampler is not None:
            given = logits, choices.params[SAMPLER], rows
            is_random = (rows.sampling.temperature > 0) & (drawn != UNUSABLE)
            drawn, memory = _made_where(is_random, SAMPLER, self.sampler, given, drawn, memory)
        for name, each in self.of_logits.items():
            if each.after is not None:
                after, params = each.over_rows(each.after), choices.params[name]
                memory[name] = after(memory[name], params, rows, drawn, logits)
        return logits, drawn, memory


def _made_where(
    is_chosen: Bool[Array, " B"],
    name: str,
    each: LogitsProcessor,
    given: Sequence[Any],
    otherwise: Array,
    memory: dict[str, Any],
) -> tuple[Array, dict[str, Any]]:
    """What a function makes of the rows that chose it, and what is remembered of them. Where no row
    did, it does not run."""

    def run(otherwise: Array, state: Any) -> tuple[Array, Any]:
        call = each.over_rows(each.function)
        made, state = (call(*given), state) if each.init is None else call(*given, state)
        chosen = jnp.expand_dims(is_chosen, range(1, made.ndim))
        return jnp.where(chosen, made, otherwise), state

    skip = lambda otherwise, state: (otherwise, state)
    made, state = lax.cond(is_chosen.any(), run, skip, otherwise, memory.get(name, ()))
    return made, memory if each.init is None else memory | {name: state}


NO_FUNCTIONS = Functions()


def places_of(intervention: Intervention, num_layers: int) -> frozenset[Place]:
    """Where it is applied."""
    if intervention.at not in IN_LAYERS:
        return frozenset([Place(intervention.at)])
    layers = range(num_layers) if intervention.layers is None else intervention.layers
    return frozenset(Place(intervention.at, layer) for layer in layers)


def _edit(
    intervention: Intervention, name: str, batch: Batch, choices: Choices
) -> Callable[[Place, Float[Array, "T D"]], Float[Array, "T D"]]:
    """The intervention on all tokens of a batch; those of rows that did not choose it stay."""
    row = jnp.minimum(batch.rows, len(batch.query_lens) - 1)
    is_chosen = choices.is_chosen[name][row] & (batch.rows < len(batch.query_lens))
    params = {param: values[row] for param, values in choices.params[name].items()}

    def edit(place: Place, value: Float[Array, "T D"]) -> Float[Array, "T D"]:
        layer = jnp.full_like(batch.positions, -1 if place.layer is None else place.layer)
        tokens = Token(batch.positions, batch.prompt_lens[row], layer)

        def run(value: Float[Array, "T D"]) -> Float[Array, "T D"]:
            new = jax.vmap(intervention.function)(value.astype(jnp.float32), params, tokens)
            return jnp.where(is_chosen[:, None], new.astype(value.dtype), value)

        return lax.cond(is_chosen.any(), run, lambda value: value, value)

    return edit
