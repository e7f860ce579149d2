"""Which pages of the KV pool are free. It knows page ids only: neither arrays nor requests."""

from collections import Counter
from collections.abc import Iterable


class PagePool:
    """The ids `1 .. num_pages`, handed out and taken back; page 0 is nobody's."""

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages: expected at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages that nobody else holds; the caller has made sure that there are as many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: Iterable[int]) -> None:
        """Takes back pages that came from `allocate`; the last one given back goes out first."""
        self._free.extend(pages)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raises unless the free pages and the `held` ones are together every page exactly once."""
        counts = Counter(self._free)
        counts.update(held)
        pages = range(1, self.num_pages + 1)
        lost = [page for page in pages if page not in counts]
        twice = sorted(page for page, count in counts.items() if count > 1)
        foreign = sorted(page for page in counts if page not in pages)
        if lost or twice or foreign:
            raise RuntimeError(f"page pool corrupt: {lost=}, {twice=}, {foreign=}")
