"""What a launch brought, entered into a request: its tokens up to the one that ends it and why that
one does, and what was told of their distributions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine import outputs
from jaxengine.hidden_states import Launch
from jaxengine.logprobs import Told
from jaxengine.request import Request, Status
from jaxengine.step_plan import Row, StepPlan

NOT_FINITE = -1  # what a step draws from logits it cannot use
NOT_FINITE_REASON = outputs.not_finite_reason()


def book_logprobs(
    row: Row,
    index: int,
    first: int,
    tokens: Sequence[int],
    of_drawn: Told | None,
    of_inputs: Told | None,
) -> None:
    """Books what a launch told of a row, whose own tokens begin at `first` among all it read.
    `tokens` has one of each step, also of those that the row did not draw. Entries of tokens that
    turn out to stand behind the end are never shown."""
    request, start, end = row.request, row.start, row.start + row.query_len
    books, prompt = request.logprobs, request.prompt_ids
    if books is None or of_drawn is None:
        return
    if of_inputs is not None and books.tells_inputs(start, end, len(prompt)):
        books.add_inputs(start, prompt[start + 1 : end + 1], of_inputs, first)
    if row.num_draws:
        books.add_outputs(tokens[: row.num_draws], of_drawn, index)
    elif not request.max_new_tokens and end == len(prompt):
        books.add_next(tokens[0], of_drawn, index)


def book_states(plan: StepPlan, launch: Launch) -> None:
    """Books the hidden states that a launch gave of each row that asked."""
    first = 0  # the row's first token among those that were read
    for index, row in enumerate(plan.rows):
        books = row.request.states
        if books is not None and row.request.status is not Status.FINISHED:
            end = row.start + row.query_len
            books.add(launch, index, first, row.start, end, max(row.num_draws, 1))
        first += row.query_len


def read_reason(request: Request) -> dict[str, Any]:
    """Why a request ends whose prompt is read and whose continuation nobody wants."""
    if request.embedding is not None and not np.isfinite(request.embedding).all():
        return NOT_FINITE_REASON
    return outputs.length_reason(request.max_new_tokens)


def append(request: Request, tokens: Sequence[int]) -> dict[str, Any] | None:
    """Books drawn tokens up to the one that ends the request, and says why it does; those behind it
    are dropped."""
    plain = request.stop_text is None and request.matcher is None
    if plain and request.stop_token_ids.isdisjoint(tokens) and NOT_FINITE not in tokens:
        request.output_ids.extend(tokens)
        is_last = len(request.output_ids) >= request.max_new_tokens
        return outputs.length_reason(request.max_new_tokens) if is_last else None
    for token in tokens:
        if token == NOT_FINITE:
            return NOT_FINITE_REASON
        request.output_ids.append(token)
        reason = _end_with(request, token) or foresee(request)
        if reason is not None:
            return reason
    return None


def foresee(request: Request) -> dict[str, Any] | None:
    """Books the tokens that its grammar leaves no choice of, likewise."""
    if not request.skips_forced:
        return None
    for token in request.matcher.forced_tokens():
        request.foresee(token)
        reason = _end_with(request, token)
        if reason is not None:
            return reason
    return None


def _end_with(request: Request, token: int) -> dict[str, Any] | None:
    return grammar_error(request, token) or stop_reason(request, token)


def grammar_error(request: Request, token: int) -> dict[str, Any] | None:
    """Takes the grammar on by a token; why it cannot go on, if it cannot."""
    if request.matcher is None:
        return None
    request.matcher.accept(token)
    error = request.matcher.error
    return outputs.bad_request_reason(f"grammar: {error}") if error else None


def stop_reason(request: Request, token: int) -> dict[str, Any] | None:
    """Why a request ends with the token it just got: the token, its text, the end of its grammar,
    or its length, in this order.

    An end-of-sequence token in the last allowed place is a stop, not a length.
    """
    is_stop_token = token in request.stop_token_ids
    is_last = len(request.output_ids) >= request.max_new_tokens
    is_complete = request.matcher is not None and request.matcher.is_stopped
    matched = None
    if request.stop_text is not None:
        try:
            if not is_stop_token or request.sampling.no_stop_trim:
                matched = request.stop_text.add(token)
            if matched is None and (is_stop_token or is_complete or is_last):
                matched = request.stop_text.finish()
        except ValueError as error:  # a stop expression that takes too long
            return outputs.bad_request_reason(str(error))
    if is_stop_token:
        return outputs.stop_reason(token)
    if matched is not None:
        return outputs.stop_reason(matched)
    if is_complete:
        return outputs.stop_reason(token)
    return outputs.length_reason(request.max_new_tokens) if is_last else None
