"""The device: parameters, KV pool and request state, and the compiled steps over them.

`submit` turns a plan into one upload and one launch and returns at once; `collect` waits for its
tokens. It knows slots, pages and sizes, and nothing of queues, text or users.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine import programs
from jaxengine.compiling import Bucket, thinned
from jaxengine.logprobs import Told, Wanted
from jaxengine.programs import InstallInputs, Outputs, RequestState, RowInputs
from jaxengine.request import Request
from jaxengine.scheduler import StepPlan
from jaxengine.step_programs import INSTALL, INSTALL_ROWS, StepPrograms

logger = logging.getLogger("jaxengine")


class Runner:
    """The compiled programs with the arrays they run on."""

    def __init__(
        self,
        steps: StepPrograms,
        executables: Mapping[Any, Any],
        params: Any,  # the tree of arrays whose shapes `steps` knows
        num_pages: int,
    ):
        self._params = tuple(jax.tree.leaves(params))
        self._install = executables[INSTALL]
        self._steps: dict[Bucket, Any] = {
            key: executables[key] for key in sorted(key for key in executables if key != INSTALL)
        }
        self._programs, self._num_pages = steps, num_pages
        self._telling: dict[tuple[Bucket, Wanted], Any] = {}  # steps that tell of distributions
        self._telling_sizes = thinned(self._steps)
        self._empty_install = steps.empty_install()
        self._pack_sampling = steps.pack_sampling
        self._cache, self._state = steps.make_buffers(num_pages)
        self._num_slots = self._state.tokens.shape[0] - 1
        self._warm_up()

    def submit(self, plan: StepPlan) -> Outputs:
        """Starts a step; what it tells is on its way to the host when `collect` asks for it."""
        self._admit(plan.admitted)
        bucket, wanted = self._bucket(plan), plan.wanted
        packed = self._padding_rows(bucket.num_rows, 0 if wanted is None else wanted.ids)
        fields = [row[1:] for row in plan.rows]  # all but the request
        packed[: len(plan.rows), : programs.NUM_ROW_FIELDS] = fields
        if wanted is not None:
            for index, row in enumerate(plan.rows):
                ids = row.request.logprobs.ids if row.request.logprobs else ()
                packed[index, programs.NUM_ROW_FIELDS :][: len(ids)] = ids
        told = self._run(bucket, packed, wanted)
        for leaf in jax.tree.leaves(told):
            leaf.copy_to_host_async()
        return told

    def collect(self, told: Outputs) -> list[list[int]]:
        """The tokens of a submitted plan, for each bucket row one of each step; -1 for logits that
        are not finite."""
        return np.asarray(told.drawn).T.tolist()

    def collect_logprobs(self, told: Outputs) -> tuple[Told | None, Told | None]:
        """What it tells of the tokens drawn, `[steps, rows]`, and of those behind tokens read."""
        return jax.tree.map(np.asarray, (told.of_drawn, told.of_inputs))

    def close(self) -> None:
        """Gives the device memory back. Nothing of the device is left to be freed later, perhaps
        when the interpreter is half gone already."""
        for leaf in jax.tree.leaves((self._params, self._cache, self._state)):
            if not leaf.is_deleted():
                leaf.delete()
        self._params = self._cache = ()
        del self._state, self._install, self._steps, self._telling

    def _bucket(self, plan: StepPlan) -> Bucket:
        """The smallest that holds the plan: a decoding one if there is one so large."""
        fitting = [
            bucket
            for bucket in (self._steps if plan.wanted is None else self._telling_sizes)
            if bucket.num_tokens >= plan.num_tokens and bucket.num_rows >= len(plan.rows)
        ]
        decoding = (bucket for bucket in fitting if bucket.num_steps == plan.num_steps)
        return next(decoding, None) or next(bucket for bucket in fitting if not bucket.num_steps)

    def _run(self, bucket: Bucket, packed: np.ndarray, wanted: Wanted | None = None) -> Outputs:
        state, step = self._state, self._steps[bucket]
        if wanted is not None:
            step = self._telling_step(bucket, wanted)
        self._cache, tokens, page_table, told = step(
            self._params, self._cache, state.tokens, state.page_table, state.sampling, packed
        )
        self._state = RequestState(tokens, page_table, state.sampling)
        return told

    def _telling_step(self, bucket: Bucket, wanted: Wanted) -> Any:
        """Compiled when it is first needed: most engines are never asked."""
        key = bucket, wanted
        if key not in self._telling:
            logger.info("compiling %s for log-probabilities; later starts will load it", bucket)
            self._telling[key] = self._programs.trace_step(bucket, self._num_pages, wanted)()
        return self._telling[key]

    def _admit(self, requests: Sequence[Request]) -> None:
        """Installs requests, several at a time; a long history in as many calls as it takes."""
        room = len(self._empty_install.tokens)
        rows: list[tuple[Request, int, list[int]]] = []  # and the tokens from a position on
        for request in requests:
            tokens = request.token_ids
            for start in range(0, len(tokens), room):
                part = tokens[start : start + room]
                if len(rows) == INSTALL_ROWS or sum(len(row[2]) for row in rows) + len(part) > room:
                    self._install_rows(rows)
                    rows = []
                rows.append((request, start, part))
        if rows:
            self._install_rows(rows)

    def _install_rows(self, rows: Sequence[tuple[Request, int, list[int]]]) -> None:
        new = InstallInputs(*(field.copy() for field in self._empty_install))
        end = 0
        for index, (request, start, tokens) in enumerate(rows):
            new.slots[index], new.starts[index] = request.slot, start
            new.num_tokens[index] = len(tokens)
            new.sampling[index] = self._pack_sampling(request)
            new.page_table[index, : len(request.pages)] = request.pages
            new.tokens[end : end + len(tokens)] = tokens
            end += len(tokens)
        self._state = self._install(self._state, new)

    def _padding_rows(self, num_rows: int, num_ids: int = 0) -> np.ndarray:
        packed = np.zeros((num_rows, programs.NUM_ROW_FIELDS + num_ids), np.int32)
        packed[:, RowInputs._fields.index("slots")] = self._num_slots
        return packed

    def _warm_up(self) -> None:
        """Runs every step once on padding alone: libraries and graphs are set up before the first
        request."""
        for bucket in self._steps:
            jax.block_until_ready(self._run(bucket, self._padding_rows(bucket.num_rows)))
