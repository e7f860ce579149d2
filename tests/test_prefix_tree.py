"""The prefix tree: what it finds, what it keeps, and in which order it forgets."""

import random
from array import array
from functools import partial

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxengine.prefix_tree import Node, PrefixTree

array_of = partial(array, "I")
A, B, C, D = map(array_of, ([1, 1], [2, 2], [3, 3], [4, 4]))
"""The tokens of one page each, where pages have two."""


def ids(path: list[Node]) -> list[int]:
    return [node.page for node in path]


def grown(tree: PrefixTree, tokens: array, pages: list[int]) -> list[Node]:
    """A locked path for `tokens`, as a request that has computed them leaves it."""
    path = tree.match(tokens, len(tokens))
    tree.lock(path)
    tree.insert(path, tokens, pages, len(tokens))
    return path


def cached(tree: PrefixTree, tokens: array, pages: list[int]) -> None:
    tree.unlock(grown(tree, tokens, pages))


# Finding


def test_an_empty_tree_matches_nothing():
    assert PrefixTree(2).match(A + B, 4) == []


def test_the_longest_prefix_of_full_pages_is_found():
    tree = PrefixTree(2)
    cached(tree, A + B + C, [7, 8, 9])
    assert ids(tree.match(A + B + C + D, 8)) == [7, 8, 9]
    assert ids(tree.match(A + B + D, 6)) == [7, 8]
    assert ids(tree.match(B + C, 4)) == []  # the pages of B hold it behind A only


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1, 0), (2, 1), (3, 1), (5, 2), (6, 3)])
def test_no_more_than_the_limit_is_ever_matched(limit, found):
    tree = PrefixTree(2)
    cached(tree, A + B + C, [7, 8, 9])
    assert len(tree.match(A + B + C, limit)) == found


def test_a_page_that_is_not_full_is_not_inserted():
    tree = PrefixTree(2)
    path: list[Node] = []
    tree.insert(path, A + B, [7, 8], end=3)
    assert ids(path) == [7]


def test_pages_of_one_token_are_pages_too():
    tree = PrefixTree(1)
    cached(tree, array_of([5, 6, 7]), [1, 2, 3])
    assert ids(tree.match(array_of([5, 6, 8]), 3)) == [1, 2]


# Growing


def test_insert_continues_a_path_chunk_by_chunk():
    tree = PrefixTree(2)
    tokens, pages, path = A + B + C + D, [6, 7, 8, 9], []
    for end in (1, 2, 5, 8):
        tree.insert(path, tokens, pages, end)
        assert ids(path) == pages[: end // 2]
        tree.check_integrity([path])
    assert ids(tree.match(tokens, 8)) == pages


def test_prefixes_branch_where_they_differ():
    tree = PrefixTree(2)
    cached(tree, A + B, [1, 2])
    cached(tree, A + C, [9, 3])
    assert ids(tree.match(A + B, 4)) == [1, 2]
    assert ids(tree.match(A + C, 4)) == [1, 3]
    assert len(list(tree.nodes())) == 3


def test_a_running_path_ends_before_a_page_that_the_tree_has_already():
    tree = PrefixTree(2)
    cached(tree, A + B, [1, 2])
    path: list[Node] = []
    tree.insert(path, A + B + C, [7, 8, 9], end=6)
    assert path == []
    assert tree.num_evictable == 2


def test_a_path_that_passes_duplicates_keeps_the_trees_pages_and_adds_what_follows():
    tree = PrefixTree(2)
    cached(tree, A + B, [1, 2])
    path: list[Node] = []
    tree.insert(path, A + B + C, [7, 8, 9], end=6, passes_duplicates=True)
    assert ids(path) == [1, 2, 9]  # 7 and 8 are still the caller's
    tree.unlock(path)
    assert ids(tree.match(A + B + C, 6)) == [1, 2, 9]


# Forgetting


def test_what_is_locked_is_never_evicted():
    tree = PrefixTree(2)
    path = grown(tree, A + B, [1, 2])
    assert tree.num_evictable == 0
    assert tree.evict(9) == []
    tree.unlock(path)
    assert tree.num_evictable == 2
    assert tree.evict(9) == [2, 1]
    assert tree.match(A + B, 4) == []


def test_every_lock_counts():
    tree = PrefixTree(2)
    path = grown(tree, A + B, [1, 2])
    tree.lock(path[:1])
    tree.unlock(path)
    assert tree.evict(9) == [2]
    tree.unlock(path[:1])
    assert tree.evict(9) == [1]


def test_no_more_than_asked_for_is_evicted():
    tree = PrefixTree(2)
    cached(tree, A + B + C, [1, 2, 3])
    assert tree.evict(0) == []
    assert tree.evict(1) == [3]
    assert tree.num_evictable == 2


def test_the_least_recently_used_leaf_goes_first():
    tree = PrefixTree(2)
    for page, tokens in enumerate((A, B, C, D), start=1):
        cached(tree, tokens, [page])
    cached(tree, A, [9])  # used again
    cached(tree, C, [9])
    assert tree.evict(3) == [2, 4, 1]
    assert tree.evict(1) == [3]


def test_a_parent_outlives_its_children_however_old_it_is():
    tree = PrefixTree(2)
    cached(tree, A, [1])
    cached(tree, B, [2])
    cached(tree, A + C, [1, 3])
    assert tree.evict(9) == [2, 3, 1]


def test_a_match_alone_is_no_use():
    tree = PrefixTree(2)
    cached(tree, A, [1])
    cached(tree, B, [2])
    tree.match(A, 2)
    assert tree.evict(1) == [1]


def test_an_evicted_page_may_come_back_with_other_tokens():
    tree = PrefixTree(2)
    cached(tree, A, [1])
    assert tree.evict(1) == [1]
    cached(tree, B, [1])
    assert tree.match(A, 2) == []
    assert ids(tree.match(B, 2)) == [1]
    assert tree.evict(9) == [1]


def test_an_unlocked_path_can_be_forgotten_up_to_what_others_build_on():
    tree = PrefixTree(2)
    cached(tree, A + D, [1, 4])
    path = grown(tree, A + B + C, [1, 2, 3])
    tree.unlock(path)
    assert tree.forget(path) == [3, 2]
    assert ids(tree.match(A + D, 4)) == [1, 4]
    tree.check_integrity([])
    assert tree.evict(9) == [4, 1]


def test_what_is_locked_is_not_forgotten():
    tree = PrefixTree(2)
    path = grown(tree, A + B, [1, 2])
    tree.lock(path)
    tree.unlock(path)
    assert tree.forget(path) == []


def test_the_books_of_eviction_do_not_grow_with_use():
    tree = PrefixTree(2)
    for _ in range(1000):
        cached(tree, A + B, [1, 2])
        cached(tree, A + C, [1, 3])
    assert len(tree._candidates) <= 3


# Integrity


def test_a_lock_too_many_or_too_few_is_noticed():
    tree = PrefixTree(2)
    path = grown(tree, A + B, [1, 2])
    tree.check_integrity([path])
    with pytest.raises(RuntimeError, match="1 locks on page"):
        tree.check_integrity([])
    with pytest.raises(RuntimeError, match="1 locks on page"):
        tree.check_integrity([path, path])


def test_a_locked_node_outside_the_tree_is_noticed():
    with pytest.raises(RuntimeError, match="not in the tree"):
        PrefixTree(2).check_integrity([[Node(None, A.tobytes(), 1)]])


def test_a_page_whose_tokens_are_not_all_known_is_noticed():
    tree = PrefixTree(2)
    path: list[Node] = []
    tree.insert(path, array_of([1, 1, 2]), [1, 2], end=4)
    with pytest.raises(RuntimeError, match="page 2 is not full"):
        tree.check_integrity([path])


def test_a_wrong_count_is_noticed():
    tree = PrefixTree(2)
    cached(tree, A, [1])
    tree.num_evictable += 1
    with pytest.raises(RuntimeError, match="1 evictable, 2 counted"):
        tree.check_integrity([])


# Against a model: every prefix by name in a dictionary

TOKENS = st.lists(st.integers(0, 1), max_size=10).map(array_of)


class AgainstADictionary(RuleBasedStateMachine):
    @initialize(page_size=st.integers(1, 3))
    def start(self, page_size: int) -> None:
        self.tree = PrefixTree(page_size)
        self.page_size = page_size
        self.pages: dict[tuple[int, ...], int] = {}  # prefix -> page of its last tokens
        self.last_used: dict[tuple[int, ...], int] = {}
        self.running: list[tuple[array, list[Node]]] = []
        self.num_pages = 0
        self.time = 0

    def prefixes(self, tokens: array) -> list[tuple[int, ...]]:
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [tuple(tokens[:end]) for end in ends]

    def locked(self) -> set[tuple[int, ...]]:
        return {
            prefix for tokens, path in self.running for prefix in self.prefixes(tokens)[: len(path)]
        }

    @rule(tokens=TOKENS, passes_duplicates=st.booleans(), keeps=st.integers(0, 10))
    def run(self, tokens, passes_duplicates, keeps) -> None:
        path = self.tree.match(tokens, keeps)
        self.tree.lock(path)
        prefixes = self.prefixes(tokens)
        pages = ids(path)
        while len(pages) < len(prefixes):
            self.num_pages += 1
            pages.append(self.num_pages)
        expected = list(pages[: len(path)])
        for prefix, page in list(zip(prefixes, pages, strict=True))[len(path) :]:
            if prefix in self.pages and not passes_duplicates:
                break
            expected.append(self.pages.setdefault(prefix, page))
        self.tree.insert(path, tokens, pages, len(tokens), passes_duplicates=passes_duplicates)
        assert ids(path) == expected
        self.running.append((tokens, path))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), forgets=st.booleans())
    def end(self, data, forgets) -> None:
        tokens, path = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.tree.unlock(path)
        self.time += 1
        prefixes = self.prefixes(tokens)[: len(path)]
        for prefix in prefixes:
            self.last_used[prefix] = self.time
        if forgets:
            expected = []
            for prefix in reversed(prefixes):
                if prefix in self.locked() or self.has_child(prefix):
                    break
                expected.append(self.pages.pop(prefix))
            assert self.tree.forget(path) == expected

    def has_child(self, prefix: tuple[int, ...]) -> bool:
        length = len(prefix)
        return any(len(p) == length + self.page_size and p[:length] == prefix for p in self.pages)

    @rule(count=st.integers(0, 4))
    def evict(self, count) -> None:
        expected = []
        for _ in range(count):
            locked = self.locked()
            leaves = [p for p in self.pages if p not in locked and not self.has_child(p)]
            if leaves:
                oldest = min(leaves, key=lambda p: self.last_used[p])
                expected.append(self.pages.pop(oldest))
        assert self.tree.evict(count) == expected

    @rule(tokens=TOKENS, limit=st.integers(0, 10))
    def match(self, tokens, limit) -> None:
        expected = []
        for prefix in self.prefixes(tokens[:limit]):
            if prefix not in self.pages:
                break
            expected.append(self.pages[prefix])
        assert ids(self.tree.match(tokens, min(limit, len(tokens)))) == expected

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "tree"):
            self.tree.check_integrity([path for _, path in self.running])
            assert sorted(node.page for node in self.tree.nodes()) == sorted(self.pages.values())


AgainstADictionary.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
test_the_tree_agrees_with_a_dictionary_of_prefixes = AgainstADictionary.TestCase


def test_eviction_of_a_large_tree_returns_every_page_once():
    rng = random.Random(0)
    tree = PrefixTree(2)
    num_pages = 0
    for _ in range(500):
        tokens = array_of(rng.randrange(2) for _ in range(2 * rng.randint(1, 8)))
        path = tree.match(tokens, len(tokens))
        tree.lock(path)
        pages = ids(path) + list(range(num_pages + 1, num_pages + 1 + len(tokens) // 2 - len(path)))
        num_pages = max([num_pages, *pages])
        tree.insert(path, tokens, pages, len(tokens))
        tree.unlock(path)
    assert sorted(tree.evict(num_pages)) == list(range(1, num_pages + 1))
