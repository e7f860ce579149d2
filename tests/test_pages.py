"""The page pool hands out every page once and knows when it did not."""

import pytest

from jaxengine.pages import PagePool


def test_pages_are_numbered_from_one_because_page_zero_is_nobodys():
    pool = PagePool(5)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0


def test_pages_given_back_can_be_had_again():
    pool = PagePool(3)
    first = pool.allocate(2)
    pool.free(first)
    assert pool.num_free == 3
    assert len(set(pool.allocate(3))) == 3


def test_no_page_at_all_may_be_asked_for():
    pool = PagePool(1)
    assert pool.allocate(0) == []
    assert pool.num_free == 1


def test_more_pages_than_are_free_are_an_error_that_takes_none():
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("num_pages", [0, -1])
def test_a_pool_has_at_least_one_page(num_pages):
    with pytest.raises(ValueError, match=f"num_pages: expected at least 1, got {num_pages}"):
        PagePool(num_pages)


def test_integrity_means_that_each_page_is_free_or_held_once():
    pool = PagePool(4)
    held = pool.allocate(3)
    pool.check_integrity(held)
    with pytest.raises(RuntimeError, match=rf"lost=\[{held[0]}\], twice=\[\]"):
        pool.check_integrity(held[1:])
    with pytest.raises(RuntimeError, match=rf"lost=\[\], twice=\[{held[0]}\]"):
        pool.check_integrity([*held, held[0]])
    with pytest.raises(RuntimeError, match=r"foreign=\[0, 5\]"):
        pool.check_integrity([*held, 5, 0])


def test_a_page_freed_twice_is_noticed():
    pool = PagePool(2)
    page = pool.allocate(1)
    pool.free(page)
    pool.free(page)
    with pytest.raises(RuntimeError, match="twice"):
        pool.check_integrity([])
