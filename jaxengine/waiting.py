"""The requests that wait for admission, in a policy's order; those of a group wait as one. It knows
neither slots nor pages."""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence

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
        """Gives a new request its place, which it keeps: by priority, policy and arrival. That of a
        group is its first one's."""
        first = request.mates[0]
        if request is not first:
            request.order = first.order
            self._num_waiting += 1
            return
        by_policy = {"lof": -request.max_new_tokens, "random": self._random.random()}
        request.order = (
            self._priority_sign * request.priority,
            by_policy.get(self._policy, 0),
            next(self._num_arrived),
        )
        self.put_back([request])

    def put_back(self, group: Sequence[Request]) -> None:
        """Queues requests that were taken together, or sent back, at the place they had."""
        first = group[0].mates[0]  # which may have ended
        heapq.heappush(self._heap, (first.order, first))
        self._num_waiting += len(group)

    def take(self, num_shared: Callable[[Request], int]) -> list[list[Request]]:
        """Takes the first request, with its group; by `lpm` the first few of one priority, most
        shared first."""
        window: list[list[Request]] = []
        limit = LPM_WINDOW if self._policy == "lpm" else 1
        while self._heap and len(window) < limit:
            order, request = self._heap[0]
            if window and order[0] != window[0][0].order[0]:
                break
            heapq.heappop(self._heap)
            if waiting := [mate for mate in request.mates if mate.status is Status.WAITING]:
                window.append(waiting)
        if len(window) > 1:  # stable: by arrival where they are equal
            window.sort(key=lambda group: max(map(num_shared, group)), reverse=True)
        self._num_waiting -= sum(map(len, window))
        return window

    def drop(self) -> None:
        """One request fewer waits: its status says which, and its entry goes when it is met."""
        self._num_waiting -= 1
