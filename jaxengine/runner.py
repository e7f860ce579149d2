"""The device: parameters, KV pool and request state, and the compiled steps over them.

`submit` turns a plan into one upload and one launch and returns at once; `collect` waits for its
tokens. A plan that pauses is only read by `submit`, and ends with `draw`, once the host knows what
may be drawn. It knows slots, pages and sizes, and nothing of queues, text or users.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxengine.compiling import Bucket, thinned
from jaxengine.hidden_states import Launch, WantedStates
from jaxengine.installs import INSTALL_SIZES, installs
from jaxengine.launch import Outputs, Variant
from jaxengine.logprobs import Told
from jaxengine.packing import pack, padding
from jaxengine.profiling import launch_annotations
from jaxengine.request import Request
from jaxengine.request_state import RequestState
from jaxengine.sampling.masks import everything, num_words
from jaxengine.small_blocks import small_blocks
from jaxengine.step_plan import StepPlan
from jaxengine.step_programs import StepPrograms
from jaxengine.variants import Variants


class Packed(NamedTuple):
    """A plan as a program takes it."""

    bucket: Bucket
    variant: Variant
    rows: np.ndarray


class Paused(NamedTuple):
    """A plan whose tokens are yet to be drawn."""

    rows: np.ndarray  # packed
    variant: Variant
    logits: jax.Array  # [B, V]
    told: Outputs


class Runner:
    """The compiled programs with the arrays they run on."""

    def __init__(
        self,
        steps: StepPrograms,
        executables: Mapping[Any, Any],
        params: Any,  # the tree of arrays whose shapes `steps` knows
        num_pages: int,
        *,
        shows_progress: bool = False,
    ):
        self._params = tuple(jax.tree.leaves(params))
        self._installs = {size.num_rows: executables[size] for size in INSTALL_SIZES}
        self._empty_installs = [steps.empty_install(size) for size in INSTALL_SIZES]
        self._logits: dict[int, jax.Array] = {}  # of steps that pause, by their number of rows
        self._masks: dict[int, np.ndarray] = {}  # likewise
        self._steps: dict[Bucket, Any] = {
            key: executables[key] for key in sorted(executables.keys() - set(INSTALL_SIZES))
        }
        self._programs, self._num_pages = steps, num_pages
        self._plain = steps.plain
        self.variants = Variants(
            steps, thinned(self._steps), num_pages, shows_progress=shows_progress
        )
        self.put_buffers(self.make_buffers())
        self._num_slots = self._state.tokens.shape[0] - 1
        num_rows = max(bucket.num_rows for bucket in self._steps)
        self._blocks = small_blocks(steps.device, 4 * num_rows * num_words(steps.vocab_size))
        self._annotation = launch_annotations()
        self.warm_up()

    def warm_up(self) -> None:
        """Runs every plain step once on padding alone: libraries and graphs are set up before the
        first request. XLA throws all graphs of a process away when something is compiled in it; a
        step without one takes the host 10 to 20 ms, once."""
        for bucket in self._steps:
            rows = padding(bucket, self._plain, self._num_slots)
            jax.block_until_ready(self._run(bucket, rows, self._plain))

    def pack(self, plan: StepPlan) -> Packed:
        """What `submit` takes beside a plan; made of the plan alone."""
        part = "read" if plan.pauses else self._plain.part
        variant = Variant(part, plan.wanted, plan.states)
        bucket = self._bucket(plan, variant)
        return Packed(bucket, variant, pack(plan, bucket, variant, self._num_slots))

    def submit(self, plan: StepPlan, packed: Packed) -> Outputs | Paused:
        """Starts a step; what it tells is on its way to the host when `collect` asks for it."""
        self._save(plan.retracted)
        self._admit(plan.admitted)
        bucket, variant, rows = packed
        with self._annotation(plan):
            made = self._run(bucket, rows, variant)
        if not plan.pauses:
            return _sent(made[0])
        return Paused(rows[: bucket.num_rows], variant, *made)

    def masks(self, paused: Paused) -> np.ndarray:
        """Packed bits `[B, words]` of what a paused plan may draw, to be written over; the rows of
        the plan come first. Always the same memory for so many rows: nobody reads it any more, as
        the tokens of plans before, which were drawn with it, are collected by then."""
        num_rows = len(paused.rows)
        if num_rows not in self._masks:
            self._masks[num_rows] = everything(num_rows, self._programs.vocab_size)
        return self._masks[num_rows]

    def adjust(self, paused: Paused, masks: np.ndarray) -> np.ndarray:
        """The logits `[B, V]` of a paused plan after the engine's own adjustments, for the tokens
        that packed bits allow."""
        return np.array(self._draw("adjust", paused, paused.logits, masks)[0])

    def draw(self, paused: Paused, masks: np.ndarray) -> Outputs:
        """Draws the tokens of a paused plan, of those that packed bits allow."""
        return self._drawn(paused, self._draw("draw", paused, paused.logits, masks))

    def choose(self, paused: Paused, adjusted: np.ndarray) -> Outputs:
        """Draws them from logits that were made of what `adjust` gave."""
        logits = jax.device_put(adjusted, paused.logits.sharding)
        return self._drawn(paused, self._draw("choose", paused, logits, paused.logits))

    def _draw(self, part: Any, paused: Paused, *given: Any) -> Sequence[Any]:
        program = self.variants.get(len(paused.rows), paused.variant.second(part))
        *changing, settings = self._state
        return program(tuple(changing), settings, paused.rows, *given)

    def _drawn(self, paused: Paused, made: Sequence[Any]) -> Outputs:
        changing, drawn = made
        self._state = RequestState(*changing, settings=self._state.settings)
        return _sent(paused.told._replace(drawn=drawn.drawn, of_drawn=drawn.of_drawn))

    def collect(self, told: Outputs) -> list[list[int]]:
        """The tokens of a submitted plan, for each bucket row one of each step; -1 for logits that
        are not finite."""
        return np.asarray(told.drawn).T.tolist()

    def collect_logprobs(self, told: Outputs) -> tuple[Told | None, Told | None]:
        """What it tells of the tokens drawn, `[steps, rows]`, and of those behind tokens read."""
        return jax.tree.map(np.asarray, (told.of_drawn, told.of_inputs))

    def collect_embeddings(self, told: Outputs) -> np.ndarray | None:
        """Float32 `[rows, size]`, of steps that embed; those of rows whose prompts did not end mean
        nothing."""
        return None if told.embeddings is None else np.asarray(told.embeddings)

    def collect_states(self, told: Outputs, wanted: WantedStates) -> Launch:
        """Its hidden states, which stay on the device."""
        assert told.states is not None, "they were asked for"
        return Launch(wanted.places, *told.states)

    @property
    def params(self) -> tuple[jax.Array, ...]:
        """The parameters, in the order of their tree's leaves."""
        return self._params

    def put_params(self, params: Sequence[jax.Array]) -> None:
        """Other arrays in place of the parameters, of the same shapes."""
        self._params = tuple(params)

    def make_buffers(self) -> tuple[tuple[jax.Array, ...], RequestState]:
        """An empty KV pool and request state."""
        return self._programs.make_buffers(self._num_pages)

    def put_buffers(self, buffers: tuple[tuple[jax.Array, ...], RequestState]) -> None:
        self._cache, self._state = buffers

    def delete_params(self) -> None:
        """Gives their memory back; until others are put in their place there are no steps."""
        _delete(self._params)

    def delete_buffers(self) -> None:
        """Gives the memory of KV pool and request state back, likewise."""
        _delete((self._cache, self._state, self._logits))
        self._logits.clear()

    def close(self) -> None:
        """Gives the device memory back. Nothing of the device is left to be freed later, perhaps
        when the interpreter is half gone already."""
        self.delete_params()
        self.delete_buffers()
        _delete(self._blocks)
        self._params = self._cache = ()
        del self._state, self._installs, self._steps
        self.variants.close()

    def _bucket(self, plan: StepPlan, variant: Variant) -> Bucket:
        """The smallest that holds the plan: a decoding one if there is one so large."""
        fitting = [
            bucket
            for bucket in (self._steps if variant == self._plain else self.variants.sizes(variant))
            if bucket.num_tokens >= plan.num_tokens and bucket.num_rows >= len(plan.rows)
        ]
        num_steps = 1 if plan.pauses and plan.spreads else plan.num_steps
        decoding = (bucket for bucket in fitting if bucket.num_steps == num_steps)
        return next(decoding, None) or next(bucket for bucket in fitting if not bucket.num_steps)

    def _run(self, bucket: Bucket, rows: np.ndarray, variant: Variant) -> Sequence[Any]:
        is_plain = variant == self._plain
        step = self._steps[bucket] if is_plain else self.variants.get(bucket, variant)
        *changing, settings = self._state
        given = self._params, self._cache, tuple(changing), settings, rows
        if variant.part == "read":
            given = *given, self._logits_to_write(bucket.num_rows)
        self._cache, changing, *made = step(*given)
        self._state = RequestState(*changing, settings=settings)
        if variant.part == "read":
            self._logits[bucket.num_rows] = made[0]
        return made

    def _logits_to_write(self, num_rows: int) -> jax.Array:
        """Always the same memory for so many rows, which thus stays out of the way of other."""
        if num_rows not in self._logits:
            shape = self._programs.logits_shape(num_rows)
            zeros = np.zeros(shape.shape, shape.dtype)
            return jax.device_put(zeros, shape.sharding, may_alias=False)
        return self._logits.pop(num_rows)

    def _save(self, retracted: Sequence[tuple[Request, int]]) -> None:
        """Takes down what registered functions remember of requests that lose their slots."""
        if retracted and jax.tree.leaves(self._state.memory):
            memory = jax.tree.map(np.asarray, self._state.memory)
            for request, slot in retracted:
                request.memory = jax.tree.map(itemgetter(slot), memory)

    def _restore(self, request: Request) -> None:
        """All of it travels: this is rare."""

        def put(leaf: jax.Array, saved: np.ndarray) -> jax.Array:
            rows = np.array(leaf)
            rows[request.slot] = saved
            return jax.device_put(rows, leaf.sharding)

        memory = jax.tree.map(put, self._state.memory, request.memory)
        self._state = self._state._replace(memory=memory)
        request.memory = None

    def _admit(self, requests: Sequence[Request]) -> None:
        for new in installs(requests, self._empty_installs, self._programs.pack_settings):
            self._state = self._installs[len(new.slots)](self._state, new)
        for request in requests:
            if request.memory is not None:
                self._restore(request)


def _sent(told: Outputs) -> Outputs:
    """On its way to the host. Hidden states stay where they are."""
    for leaf in jax.tree.leaves(told._replace(states=None)):
        leaf.copy_to_host_async()
    return told


def _delete(arrays: Any) -> None:
    for leaf in jax.tree.leaves(arrays):
        if not leaf.is_deleted():
            leaf.delete()
