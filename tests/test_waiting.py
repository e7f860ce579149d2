"""The waiting queue: places are kept, policies compare, and what ended is dropped."""

from fakes import make_request

from jaxengine.request import Request, Status
from jaxengine.waiting import LPM_WINDOW, WaitingQueue


def make_queue(policy: str = "fcfs", uses_priority: bool = False) -> WaitingQueue:
    return WaitingQueue(policy, uses_priority, low_priority_first=False, seed=0)


def filled(queue: WaitingQueue, count: int) -> list[Request]:
    requests = [make_request([0], rid=str(index)) for index in range(count)]
    for request in requests:
        queue.add(request)
    return requests


def take(queue: WaitingQueue) -> list[Request]:
    groups = queue.take(lambda request: int(request.rid))
    return [request for group in groups for request in group]


def test_an_empty_queue_has_nothing_to_take():
    queue = make_queue()
    assert len(queue) == 0 and take(queue) == []


def test_a_request_put_back_is_first_again():
    queue = make_queue()
    first, second, third = filled(queue, 3)
    assert take(queue) == [first] and take(queue) == [second]
    queue.put_back([second])
    queue.put_back([first])
    assert len(queue) == 3
    assert [take(queue) for _ in range(4)] == [[first], [second], [third], []]


def test_a_request_that_ended_is_neither_counted_nor_taken():
    queue = make_queue()
    first, second = filled(queue, 2)
    first.status = Status.FINISHED
    queue.drop()
    assert len(queue) == 1
    assert take(queue) == [second] and take(queue) == []
    assert len(queue) == 0


def test_a_group_waits_at_the_place_of_its_first():
    queue = make_queue()
    requests = [make_request([0], rid=str(index)) for index in range(5)]
    for request in requests[1:4]:
        request.group = tuple(requests[1:4])
    for request in requests:
        queue.add(request)
    assert len(queue) == 5
    assert [take(queue) for _ in range(2)] == [requests[:1], requests[1:4]]
    queue.put_back(requests[1:4])
    requests[1].status = Status.FINISHED
    queue.drop()
    assert len(queue) == 3
    assert [take(queue) for _ in range(3)] == [requests[2:4], requests[4:], []]


def test_by_longest_prefix_the_first_of_a_long_queue_are_compared():
    queue = make_queue("lpm")
    requests = filled(queue, LPM_WINDOW + 3)
    window = take(queue)
    assert window == requests[LPM_WINDOW - 1 :: -1]
    assert len(queue) == 3
    for request in window[1:]:
        queue.put_back([request])
    assert take(queue)[0] is requests[LPM_WINDOW]


def test_a_priority_that_is_not_used_changes_nothing():
    queue = make_queue()
    for priority in (0, 5, 3):
        queue.add(make_request([0], priority=priority))
    assert [take(queue)[0].priority for _ in range(3)] == [0, 5, 3]
