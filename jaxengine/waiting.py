"""The requests that wait for admission, in a policy's order. It knows neither slots nor pages."""

import heapq
import itertools
import random
from collections.abc import Callable

from jaxengine.request import Request, Status

POLICIES = ("fcfs", "lpm", "lof", "random", "priority")
"""First come first served, longest prefix match, longest output first; `priority` is `fcfs`."""

LPM_WINDOW = (
    128  # requests compared by `lpm`: to match all of a long queue each step costs too much
)


class WaitingQueue:
    """A priority queue of waiting requests; those that ended meanwhile are dropped on sight."""

    def __init__(self, policy: str, uses_priority: bool, low_priority_first: bool, seed: int):
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self._policy = policy
        self._priority_sign = (1 if low_priority_first else -1) if uses_priority else 0
        self._random = random.Random(seed)
        self._num_arrived = itertools.count()
        self._heap: list[tuple[tuple, Request]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, request: Request) -> None:
        """Gives a new request its place, which it keeps: by priority, policy and arrival."""
        by_policy = {"lof": -request.max_new_tokens, "random": self._random.random()}
        request.order = (
            self._priority_sign * request.priority,
            by_policy.get(self._policy, 0),
            next(self._num_arrived),
        )
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Queues a request that was taken, or sent back, at the place it had."""
        heapq.heappush(self._heap, (request.order, request))
        self._num_waiting += 1

    def take(self, num_shared: Callable[[Request], int]) -> list[Request]:
        """Takes the first request; by `lpm` the first few of one priority, most shared first."""
        window: list[Request] = []
        limit = LPM_WINDOW if self._policy == "lpm" else 1
        while self._heap and len(window) < limit:
            order, request = self._heap[0]
            if window and order[0] != window[0].order[0]:
                break
            heapq.heappop(self._heap)
            if request.status is Status.WAITING:
                window.append(request)
        if len(window) > 1:
            window.sort(key=num_shared, reverse=True)  # stable: by arrival where they are equal
        self._num_waiting -= len(window)
        return window

    def drop(self) -> None:
        """One request fewer waits: its status says which, and its entry goes when it is met."""
        self._num_waiting -= 1
