"""What the host has to say in the pause of a step, between the model and the draw: which tokens a
grammar allows each row, and what NumPy processors make of its logits.

A failure ends the request it occurs in, and no other.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxengine.logit_processor import CustomLogitProcessor, RequestView, process
from jaxengine.request import Request, Status
from jaxengine.sampling.masks import write_only
from jaxengine.step_plan import Row, StepPlan

Fail = Callable[[Request, str], None]  # ends a request, and says why
BeginMasks = Callable[[Sequence[Any], np.ndarray], Future[None]]  # as `GrammarCompiler`'s


class Pause:
    """Of a plan whose logits are there, or soon will be. It begins once all tokens before it are
    known; until it ends masks are filled on other threads, and the host may plan the next step."""

    def __init__(
        self,
        runner: Any,
        plan: StepPlan,
        paused: Any,  # what `submit` gave
        begin_masks: BeginMasks | None,
        fail: Fail,
    ):
        self._runner, self._paused, self._fail = runner, paused, fail
        self._rows: list[Row | None] = [row if _draws(row) else None for row in plan.rows]
        # All may have ended, and the buffers be gone; or all are amidst their prompts.
        self._is_needed = any(self._rows) or (
            plan.wanted is not None
            and any(row.request.status is not Status.FINISHED for row in plan.rows)
        )
        self._filled: Future[None] | None = None
        if not self._is_needed:
            return
        self._masks = runner.masks(paused)
        own = self._masks[: len(plan.rows)]  # others are padding
        self._foreseen = [None if row is None else row.foreseen for row in self._rows]
        self._matchers = [
            None if row is None or token is not None else row.request.matcher
            for row, token in zip(self._rows, self._foreseen, strict=True)
        ]
        if begin_masks is not None and any(self._matchers):
            self._filled = begin_masks(self._matchers, own)
        else:
            own.fill(-1)

    def end(self) -> Any:
        """Draws the tokens; what `collect` takes."""
        runner, paused = self._runner, self._paused
        if not self._is_needed:
            return paused.told
        if self._filled is not None:
            self._filled.result()
        self._finish_masks()
        processors = {row.request.processor for row in self._rows if row is not None} - {None}
        if not processors:
            return runner.draw(paused, self._masks)
        logits = runner.adjust(paused, self._masks)
        for processor in processors:
            self._process(processor, logits)
        return runner.choose(paused, logits)

    def _finish_masks(self) -> None:
        """One token alone where a grammar has gone on beyond it, and any where it has failed."""
        for index, (token, matcher) in enumerate(zip(self._foreseen, self._matchers, strict=True)):
            if token is not None:
                write_only(token, self._masks[index])
            elif matcher is not None and matcher.error:
                self._masks[index] = -1
                row = self._rows[index]
                assert row is not None, "it has a matcher"
                self._fail(row.request, f"grammar: {matcher.error}")

    def _process(self, processor: CustomLogitProcessor, logits: np.ndarray) -> None:
        found = [
            (index, row.request)
            for index, row in enumerate(self._rows)
            if row is not None and row.request.processor is processor
        ]
        rows, requests = [index for index, _ in found], [request for _, request in found]
        views = [
            RequestView(each.rid, tuple(each.prompt_ids), tuple(each.output_ids))
            for each in requests
        ]
        params: list[Any] = [each.sampling.custom_params for each in requests]
        try:
            logits[rows] = process(processor, logits[rows], params, views)
        except Exception as error:  # code of others: whatever it is, only its own requests end
            for request in requests:
                self._fail(request, f"custom_logit_processor: {type(error).__name__}: {error}")


def _draws(row: Row) -> bool:
    return row.num_draws > 0 and row.request.status is not Status.FINISHED
