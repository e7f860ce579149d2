"""What the host has to say in the pause of a step, between the model and the draw: which tokens a
grammar allows each row, and what NumPy processors make of its logits.

A failure ends the request it occurs in, and no other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxengine.logit_processor import CustomLogitProcessor, RequestView, process
from jaxengine.request import Request, Status
from jaxengine.scheduler import Row, StepPlan

Fail = Callable[[Request, str], None]  # ends a request, and says why


def finish_step(runner: Any, plan: StepPlan, paused: Any, fail: Fail) -> Any:
    """Draws the tokens of a paused plan; what `collect` takes."""
    masks = runner.everything(len(plan.rows))
    processors = {row.request.processor for row in _drawing(plan)} - {None}
    if not processors:
        return runner.draw(paused, masks)
    logits = runner.adjust(paused, masks)
    for processor in processors:
        indices = [
            index
            for index, row in enumerate(plan.rows)
            if row.num_draws and row.request.processor is processor
        ]
        _process(processor, [plan.rows[index].request for index in indices], indices, logits, fail)
    return runner.choose(paused, logits)


def _drawing(plan: StepPlan) -> Sequence[Row]:
    return [row for row in plan.rows if row.num_draws and row.request.status is not Status.FINISHED]


def _process(
    processor: CustomLogitProcessor,
    requests: Sequence[Request],
    indices: Sequence[int],
    logits: np.ndarray,
    fail: Fail,
) -> None:
    views = [
        RequestView(each.rid, tuple(each.prompt_ids), tuple(each.output_ids)) for each in requests
    ]
    params = [each.sampling.custom_params for each in requests]
    try:
        logits[indices] = process(processor, logits[indices], params, views)
    except Exception as error:  # code of others: whatever it is, only its own requests end
        for request in requests:
            fail(request, f"custom_logit_processor: {type(error).__name__}: {error}")
