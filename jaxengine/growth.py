"""The guess how much of the output that running requests are allowed they will need; it decides how
many are admitted. It counts pages, and knows neither a pool nor a queue."""

from collections.abc import Iterable

from jaxengine.request import Request

# Share of the output it is allowed that a request is expected to need: where the guess begins, how
# it falls each step and how low, how a retraction raises it, and to how many tokens it applies.
START, DECAY, FLOOR, RAISE = 0.7, 0.998, 0.1, 0.1
MAX_TOKENS = 4096


class Growth:
    """Falls while all goes well, and rises when a request has to be sent back."""

    def __init__(self, page_size: int, conservativeness: float = 1.0):
        self.share = min(1.0, START * conservativeness)
        self._floor = min(1.0, FLOOR * conservativeness)
        self._page_size = page_size

    def num_pages(self, requests: Iterable[Request]) -> float:
        """Those that requests will yet ask for."""
        num_tokens = 0
        for request in requests:
            num_tokens += max(min(request.num_to_compute - request.length, MAX_TOKENS), 0)
        return self.share * num_tokens / self._page_size

    def fall(self, num_steps: int) -> None:
        """After so many steps."""
        self.share = max(self._floor, self.share * DECAY**num_steps)

    def rise(self) -> None:
        """After a retraction."""
        self.share = min(1.0, self.share + RAISE)
