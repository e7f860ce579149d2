"""Which request holds which pages of the KV pool: those of its own, and those that it shares with
all that begin alike. It counts tokens and pages, and knows neither steps nor a queue. Host only.

A running request has its pages in `pages`; the first of them, whose nodes are in `path`, are the
prefix tree's. When it ends its full pages stay in the tree as a cache, evicted where there is need.
"""

from collections.abc import Collection, Iterable, Sequence

from jaxengine.pages import PagePool
from jaxengine.prefix_tree import Node, PrefixTree
from jaxengine.request import Request


class KVPool:
    """All pages, free, held or cached."""

    def __init__(self, num_pages: int, page_size: int, shares_prefixes: bool):
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(page_size)
        self.shares_prefixes = shares_prefixes

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones, and those of the cache."""
        return self.pool.num_free + self.tree.num_evictable

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def lacks_page(self, request: Request) -> bool:
        """Whether a running request has to have one before all of it can be computed."""
        return request.length > len(request.pages) * self.page_size

    # Prefixes

    def match(self, request: Request) -> list[Node]:
        """The pages of the cache that hold its beginning, and may be used for it. Of the last of
        them it may have to compute some tokens once more, for what they tell."""
        if not self._is_shared(request):
            return []
        path = self.tree.match(tokens := request.token_ids, len(tokens))
        return path[: self.num_pages(_num_reusable(request))]

    def num_shared(self, request: Request) -> int:
        """How many pages those are."""
        return len(self.match(request))

    def share(self, request: Request, has_ended: bool = False) -> None:
        """Puts the full pages so far into the prefix tree, where the host knows their tokens."""
        if self._is_shared(request):
            end = min(request.num_computed, request.num_tokens)
            self.tree.insert(
                request.path,
                request.token_ids,
                request.pages,
                end,
                passes_duplicates=has_ended,
            )

    def forget_prefixes(self) -> None:
        self.pool.free(self.tree.evict(self.tree.num_evictable))

    def _is_shared(self, request: Request) -> bool:
        return self.shares_prefixes and request.shares_prefix

    # Pages of a request

    def num_needed(self, requests: Iterable[Request], paths: Iterable[Sequence[Node]]) -> int:
        """Pages that requests come to need to begin on such paths, out of those available."""
        needed = sum(self.num_pages(request.length) for request in requests)
        shared = {node for path in paths for node in path}
        needed -= sum(map(len, paths))
        return needed + sum(node.num_locks == 0 for node in shared)

    def begin(self, requests: Sequence[Request], paths: Sequence[list[Node]]) -> None:
        """Gives each its pages, the first of them from the cache."""
        for path in paths:  # all of them, before a page for one of them is taken from the cache
            self.tree.lock(path)
        for request, path in zip(requests, paths, strict=True):
            new_pages = self._allocate(self.num_pages(request.length) - len(path))
            request.path = path
            request.pages = [node.page for node in path] + new_pages
            request.num_computed = min(len(path) * self.page_size, _num_reusable(request))

    def grow(self, request: Request) -> int:
        """One page more for a request: its id."""
        request.pages += self._allocate(1)
        return request.pages[-1]

    def end(self, request: Request, keeps_prefix: bool = True) -> None:
        """Takes all its pages; those in the tree stay there, unlocked, unless what they hold is not
        to be trusted."""
        if keeps_prefix:
            self.share(request, has_ended=True)
        in_tree = {node.page for node in request.path}
        self.pool.free(page for page in request.pages if page not in in_tree)
        self.tree.unlock(request.path)
        if not keeps_prefix:
            self.pool.free(self.tree.forget(request.path))
        request.pages, request.path = [], []

    def _allocate(self, count: int) -> list[int]:
        missing = count - self.pool.num_free
        if missing > 0:
            self.pool.free(self.tree.evict(missing))
        return self.pool.allocate(count)

    def check_integrity(self, running: Collection[Request]) -> None:
        """Raises unless every page has exactly one owner, the locks of the prefix tree are those of
        the running requests, and each of these has pages for its tokens."""
        private = [page for r in running for page in r.pages[len(r.path) :]]
        self.pool.check_integrity(private + [node.page for node in self.tree.nodes()])
        self.tree.check_integrity([request.path for request in running])
        for request in running:
            shared = [node.page for node in request.path]
            has_enough = len(request.pages) >= self.num_pages(request.num_computed)
            if request.pages[: len(shared)] != shared or not has_enough:
                raise RuntimeError(f"pages of request {request.rid} corrupt: {request.pages}")


def _num_reusable(request: Request) -> int:
    """Tokens at its front of which nothing but K and V is needed."""
    limit = request.num_tokens - 1  # one token is left to draw from
    if request.logprobs is not None:
        limit = min(limit, request.logprobs.num_reusable(len(request.prompt_ids), limit))
    if request.states is not None:
        limit = min(limit, request.states.num_reusable(limit))
    return limit
