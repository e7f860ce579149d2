"""The row of a request in the next step: it moves the request's books on by what the row computes,
and takes the page that this needs. Host only."""

from jaxengine.kv_pool import KVPool
from jaxengine.request import Request
from jaxengine.step_plan import MAX_UNSENT, NOBODY_ASKS, Row


def next_row(kv: KVPool, request: Request, query_len: int, num_steps: int = 1) -> Row:
    """The next `query_len` tokens of a running request, and the one that each further step draws
    and reads; from here on they all count as computed."""
    start, new_page, num_draws = request.num_computed, 0, 0
    write_start = len(request.path) * kv.page_size  # nobody writes into the tree's pages
    new_tokens: tuple[int, ...] = ()
    if request.unsent:
        query_len, new_tokens = _take_unsent(request, min(query_len, kv.page_size))
    end = start + query_len
    if end == request.length and request.max_new_tokens > 0:
        num_draws = min(num_steps, request.num_to_compute - end + 1)
        request.length += num_draws
        end += num_draws - 1
    request.num_computed = end
    if end > len(request.pages) * kv.page_size:
        new_page = kv.grow(request)
    tell_start = NOBODY_ASKS if request.logprobs is None else request.logprobs.start
    return Row(
        request,
        request.slot,
        start,
        query_len,
        new_page,
        num_draws,
        write_start,
        tell_start,
        new_tokens,
    )


def _take_unsent(request: Request, most: int) -> tuple[int, tuple[int, ...]]:
    """How many tokens a row can read, `most` at most, and those it brings along. It has room for a
    few, and for one page that is not in its table."""
    num_sent = request.length - len(request.unsent) - request.num_computed
    query_len = min(most, num_sent + MAX_UNSENT)
    num_new = max(query_len - num_sent, 0)
    new_tokens = tuple(request.unsent[:num_new])
    del request.unsent[:num_new]
    return query_len, new_tokens
