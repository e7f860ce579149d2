"""What the host has to say in the pause of a step, between the model and the draw: which tokens a
grammar allows each row, and what NumPy processors make of its logits.

A failure ends the request it occurs in, and no other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxengine.logit_processor import CustomLogitProcessor, RequestView, process
from jaxengine.request import Request, Status
from jaxengine.sampling.masks import only
from jaxengine.step_plan import Row, StepPlan

Fail = Callable[[Request, str], None]  # ends a request, and says why
FillMasks = Callable[[Sequence[Any], np.ndarray], None]  # of matchers, as `GrammarCompiler`'s


def finish_step(
    runner: Any, plan: StepPlan, paused: Any, fill_masks: FillMasks | None, fail: Fail
) -> Any:
    """Draws the tokens of a paused plan; what `collect` takes."""
    if all(row.request.status is Status.FINISHED for row in plan.rows):
        return paused.told  # nobody waits for them, and the buffers may be gone
    if plan.wanted is None and not any(map(_draws, plan.rows)):
        return paused.told  # all are amidst their prompts
    masks = runner.everything(paused)
    drawing = [row if _draws(row) else None for row in plan.rows]
    if fill_masks is not None:
        _fill(masks, drawing, fill_masks, fail)
    processors = {row.request.processor for row in drawing if row is not None} - {None}
    if not processors:
        return runner.draw(paused, masks)
    logits = runner.adjust(paused, masks)
    for processor in processors:
        rows = [i for i, row in enumerate(drawing) if row and row.request.processor is processor]
        _process(processor, [plan.rows[i].request for i in rows], rows, logits, fail)
    return runner.choose(paused, logits)


def _draws(row: Row) -> bool:
    return row.num_draws > 0 and row.request.status is not Status.FINISHED


def _fill(
    masks: np.ndarray, drawing: Sequence[Row | None], fill_masks: FillMasks, fail: Fail
) -> None:
    """Of each row with a grammar what that allows: one token alone, where the grammar has gone on
    beyond it."""
    foreseen = [None if row is None else row.foreseen for row in drawing]
    matchers = [
        None if row is None or token is not None else row.request.matcher
        for row, token in zip(drawing, foreseen, strict=True)
    ]
    if any(matchers):
        fill_masks(matchers, masks[: len(matchers)])
    for index, (row, token, matcher) in enumerate(zip(drawing, foreseen, matchers, strict=True)):
        if token is not None:
            masks[index] = only(token, masks.shape[1])
        elif row is not None and matcher is not None and matcher.error:
            masks[index] = -1
            fail(row.request, f"grammar: {matcher.error}")


def _process(
    processor: CustomLogitProcessor,
    requests: Sequence[Any],
    rows: Sequence[int],
    logits: np.ndarray,
    fail: Fail,
) -> None:
    views = [
        RequestView(each.rid, tuple(each.prompt_ids), tuple(each.output_ids)) for each in requests
    ]
    params = [each.sampling.custom_params for each in requests]
    try:
        logits[rows] = process(processor, logits[rows], params, views)
    except Exception as error:  # code of others: whatever it is, only its own requests end
        for request in requests:
            fail(request, f"custom_logit_processor: {type(error).__name__}: {error}")
