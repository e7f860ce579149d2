"""Which full pages hold the K and V of which token prefix, so that later prompts share them.

A radix tree whose edges are whole pages of tokens: a node is one page, its path from the root the
prefix. Nodes that a running request stands on are locked; the others are a cache, evicted leaf by
leaf, the least recently used first. It knows neither the pool nor requests.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

TOKEN_BYTES = array("I").itemsize


class Node:
    """One full page of one prefix."""

    __slots__ = ("children", "is_candidate", "key", "last_used", "num_locks", "page", "parent")

    def __init__(self, parent: "Node | None", key: bytes, page: int):
        self.parent = parent  # None for the root, and for what the tree has forgotten
        self.key = key  # its tokens
        self.page = page
        self.children: dict[bytes, Node] = {}
        self.num_locks = 0
        self.last_used = 0
        self.is_candidate = False  # for eviction: it has an entry in the tree's heap


class PrefixTree:
    """Pages by the tokens they hold, which come as unsigned numbers of 32 bits. Paths are lists of
    nodes from the root's child downwards."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.root = Node(None, b"", 0)
        self.num_evictable = 0  # nodes without a lock; a locked node's ancestors are locked too
        self._clock = 0
        # A heap of (last_used, page, node) with each unlocked leaf in it, and at most one entry a
        # node. An entry may be out of date: the node was used again, or is no unlocked leaf now.
        self._candidates: list[tuple[int, int, Node]] = []

    def match(self, tokens: array, limit: int) -> list[Node]:
        """The longest path of full pages whose tokens begin `tokens[:limit]`. Changes nothing."""
        path: list[Node] = []
        node = self.root
        for index in range(limit // self.page_size):
            child = node.children.get(self._key(tokens, index))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def lock(self, nodes: Sequence[Node]) -> None:
        """Keeps `nodes` (a path, or the new end of a locked one) from being evicted."""
        for node in nodes:
            self.num_evictable -= node.num_locks == 0
            node.num_locks += 1

    def unlock(self, path: Sequence[Node]) -> None:
        """Takes back one lock of each node of `path`; those left without one may be evicted."""
        self._clock += 1
        for node in path:
            node.num_locks -= 1
            node.last_used = self._clock
            self.num_evictable += node.num_locks == 0
        if path:
            self._offer(path[-1])

    def insert(
        self,
        path: list[Node],
        tokens: array,
        pages: Sequence[int],
        end: int,
        *,
        passes_duplicates: bool = False,
    ) -> None:
        """Grows the locked `path` over the full pages of `tokens[:end]`; what is new is locked too.

        `pages[i]` holds the tokens `[i * page_size, (i + 1) * page_size)`. Where the tree has that
        prefix already its own page stays, and `pages[i]` remains the caller's. The path ends before
        such a duplicate, so that it locks no page but `pages`, unless it `passes_duplicates`.
        """
        node = path[-1] if path else self.root
        for index in range(len(path), end // self.page_size):
            key = self._key(tokens, index)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, pages[index])
                self.num_evictable += 1
            elif not passes_duplicates:
                return
            self.lock([child])
            path.append(child)
            node = child

    def evict(self, count: int) -> list[int]:
        """Forgets up to `count` unlocked pages, least recently used leaves first; their ids."""
        pages: list[int] = []
        while len(pages) < count and self._candidates:
            last_used, _, node = heapq.heappop(self._candidates)
            node.is_candidate = False
            if last_used != node.last_used:
                self._offer(node)
            elif self._is_evictable(node):
                pages.append(self._remove(node))
        return pages

    def forget(self, path: Sequence[Node]) -> list[int]:
        """Removes an unlocked `path` from its end up to what others build on; the pages' ids."""
        pages: list[int] = []
        for node in reversed(path):
            if not self._is_evictable(node):
                break
            pages.append(self._remove(node))
        return pages

    def nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self, paths: Sequence[Sequence[Node]]) -> None:
        """Raises unless the locks are exactly those of `paths` and the counts agree."""
        locks = Counter(node for path in paths for node in path)
        num_evictable = 0
        for node in self.nodes():
            if node.num_locks != locks.pop(node, 0):
                raise RuntimeError(
                    f"prefix tree corrupt: {node.num_locks} locks on page {node.page}"
                )
            if self._is_evictable(node) and not node.is_candidate:
                raise RuntimeError(f"prefix tree corrupt: page {node.page} is not evictable")
            if len(node.key) != self.page_size * TOKEN_BYTES:
                raise RuntimeError(f"prefix tree corrupt: page {node.page} is not full")
            num_evictable += node.num_locks == 0
        if locks:
            raise RuntimeError("prefix tree corrupt: a locked node is not in the tree")
        if num_evictable != self.num_evictable:
            raise RuntimeError(
                f"prefix tree corrupt: {num_evictable} evictable, {self.num_evictable} counted"
            )

    def _key(self, tokens: array, index: int) -> bytes:
        """A tuple of numbers takes twice as long to be built and hashed."""
        return tokens[index * self.page_size : (index + 1) * self.page_size].tobytes()

    def _is_evictable(self, node: Node) -> bool:
        return node.parent is not None and not node.num_locks and not node.children

    def _offer(self, node: Node) -> None:
        if self._is_evictable(node) and not node.is_candidate:
            node.is_candidate = True
            heapq.heappush(self._candidates, (node.last_used, node.page, node))

    def _remove(self, node: Node) -> int:
        parent, node.parent = node.parent, None
        assert parent is not None, "only nodes of the tree are removed"
        del parent.children[node.key]
        self.num_evictable -= 1
        self._offer(parent)
        return node.page
