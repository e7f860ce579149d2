"""The scheduler against a device made of lists (`fakes`): whatever the order of events, every
request gets what it would get alone, and no page, slot or lock is lost."""

import contextlib
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes import NOT_FINITE, FakeRunner, make_request, naive_output
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxengine.request import Request, Status
from jaxengine.scheduler import Scheduler
from jaxengine.step_plan import MAX_UNSENT, Row, StepPlan

ABORTED = {"type": "abort"}
ENDED = {"type": "length"}
BROKEN = {"type": "broken"}


class Host:
    """The engine's loop without threads or text, which doubts every plan."""

    def __init__(self, learns: bool = True, **options: Any):
        self.learns = learns  # False: admits as if nothing ever grew, so that pages run out
        self.options: dict[str, Any] = {
            "num_pages": 64,
            "page_size": 4,
            "max_running_requests": 4,
            "chunk_size": 16,
        } | options
        self.scheduler = Scheduler(**self.options)
        self.runner = FakeRunner(
            num_pages=self.options["num_pages"],
            page_size=self.options["page_size"],
            num_slots=self.options["max_running_requests"],
        )
        self.requests: list[Request] = []
        self.flying: list[tuple[StepPlan, list[list[int]]]] = []
        self.lengths: dict[Request, int] = {}  # tokens that the device knows
        self.starts: dict[Request, int] = {}  # where the next row of a running request begins
        self.admitted: dict[Request, int] = {}  # and found cached, in order of first admission
        self.foresight = random.Random(0)  # how many tokens a grammar leaves no choice of

    @property
    def live(self) -> list[Request]:
        return [request for request in self.requests if request.status is not Status.FINISHED]

    @property
    def has_room_for_groups(self) -> bool:
        """Whether a step has room for a token of every running request, as in engines."""
        return self.options["chunk_size"] >= self.options["max_running_requests"]

    def add(self, prompt_ids: list[int], max_new_tokens: int = 8, **options: Any) -> Request:
        [request] = self.add_group([prompt_ids], max_new_tokens, **options)
        if max_new_tokens:
            self._foresee(request)
        return request

    def add_group(
        self, prompts: list[list[int]], max_new_tokens: int = 8, **options: Any
    ) -> list[Request]:
        """Requests whose tokens are drawn side by side."""
        group = [
            make_request(prompt, max_new_tokens, rid=f"request {rid}", **options)
            for rid, prompt in enumerate(prompts, start=len(self.requests))
        ]
        for request in group:
            request.group = tuple(group) if len(group) > 1 else ()
            self.scheduler.check(request)
        for request in group:
            self.requests.append(request)
            self.lengths[request] = len(request.prompt_ids)
            self.scheduler.add(request)
        return group

    def step(self, overlaps: bool = False) -> StepPlan | None:
        plan = self.submit()
        while len(self.flying) > (overlaps and plan is not None):
            self.collect()
        return plan

    def submit(self) -> StepPlan | None:
        assert len(self.flying) <= 1, "the host runs one step ahead, not more"
        if not self.learns:
            self.scheduler._growth.share = 0.0
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            self._doubt(plan)
            self.flying.append((plan, self.runner.submit(plan)))
        return plan

    def collect(self) -> None:
        plan, submitted = self.flying.pop(0)
        for row, tokens in zip(plan.rows, self.runner.collect(submitted), strict=True):
            self._deliver(row, tokens[: row.num_draws])
        self.scheduler.check_integrity()

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request, ABORTED)
        self.scheduler.check_integrity()

    def run(self, overlaps: bool = False, limit: int = 2000) -> int:
        """Steps until all requests have ended, and their number."""
        for num_steps in range(limit):
            if self.scheduler.is_idle and not self.flying:
                return num_steps
            self.step(overlaps)
        raise AssertionError(f"unfinished after {limit} steps: {self.live}")

    def check_outputs(self) -> None:
        for request in self.requests:
            expected = naive_output(
                request.prompt_ids, request.max_new_tokens, request.stop_token_ids
            )
            if request.finish_reason is not ENDED:
                expected = expected[: len(request.output_ids)]
            assert request.output_ids == expected, request.rid
            assert request.num_cached == self.admitted.get(request)

    def check_no_leak(self) -> None:
        assert self.scheduler.is_idle and self.scheduler.flush_cache()
        assert self.scheduler.kv.pool.num_free == self.options["num_pages"]
        self.scheduler.check_integrity()

    def _deliver(self, row: Row, tokens: list[int]) -> None:
        request = row.request
        if not tokens:
            if request.status is Status.RUNNING and not request.can_run and not request.in_flight:
                self.scheduler.finish(request, ENDED)
        is_foreseen = row.foreseen is not None
        for token in tokens:
            if request.status is Status.FINISHED:  # the rest was drawn for nobody
                return
            if token == NOT_FINITE:
                self.scheduler.finish(request, BROKEN, keeps_prefix=False)
                return
            if is_foreseen:
                assert request.skips_forced and token == row.foreseen
                return
            request.output_ids.append(token)
            self._end_with(request, token)
            self._foresee(request)

    def _foresee(self, request: Request) -> None:
        if request.skips_forced:
            known = len(request.output_ids)
            count = self.foresight.choice([0, 0, 1, 2, 5, 2 * MAX_UNSENT])
            limit = min(known + count, request.max_new_tokens)
            for token in naive_output(request.prompt_ids, limit)[known:]:
                if request.status is not Status.FINISHED:
                    request.foresee(token)
                    self._end_with(request, token)

    def _end_with(self, request: Request, token: int) -> None:
        is_last = len(request.output_ids) == request.max_new_tokens
        if token in request.stop_token_ids or is_last:
            self.scheduler.finish(request, ENDED)

    def _doubt(self, plan: StepPlan) -> None:
        requests = [row.request for row in plan.rows]
        assert requests and len(set(requests)) == len(requests)
        assert len(requests) <= self.options["max_running_requests"]
        assert plan.num_tokens == sum(row.query_len for row in plan.rows)
        assert plan.num_tokens <= self.options["chunk_size"]
        assert (plan.num_steps > 0) == (plan.num_tokens == len(plan.rows))
        assert plan.num_steps <= self.options.get("decode_steps", 1)
        starts = {row.request: row.start for row in plan.rows}
        for request in plan.admitted:
            assert request in starts or request.group
            self._doubt_admission(request, starts.get(request, request.num_computed))
        for row in plan.rows:
            self._doubt_row(plan, row)
        self._doubt_groups(plan)

    def _doubt_groups(self, plan: StepPlan) -> None:
        draws = {row.request: row.num_draws for row in plan.rows if row.num_draws}
        for request, num_draws in draws.items():
            for mate in request.group:
                is_awaited = mate.status is not Status.FINISHED and (mate in draws or mate.can_run)
                assert not is_awaited or draws[mate] == num_draws, "drawn without its group"
        for request in self.scheduler.running:
            assert all(mate.status is not Status.WAITING for mate in request.group)

    def _doubt_admission(self, request: Request, start: int) -> None:
        self.starts[request] = start
        if request.skips_forced:
            self.lengths[request] = max(self.lengths[request], request.num_tokens)
        assert self.lengths[request] == request.num_tokens, "admitted before its token was seen"
        assert start % self.options["page_size"] == 0 or start == request.num_tokens - 1
        assert self.options.get("shares_prefixes", True) or start == 0
        if request in self.admitted:
            assert request.num_retractions > 0
            return
        assert start < request.num_tokens
        self.admitted[request] = min(start, len(request.prompt_ids))
        assert request.num_cached == self.admitted[request]
        if self.options.get("policy", "fcfs") == "fcfs":
            rank = self._rank(request)
            assert all(self._rank(r) > rank for r in self.live if r not in self.admitted)

    def _rank(self, request: Request) -> tuple[int, int]:
        priority = request.priority if self.options.get("uses_priority") else 0
        sign = 1 if self.options.get("low_priority_first") else -1
        return sign * priority, self.requests.index(request)

    def _doubt_row(self, plan: StepPlan, row: Row) -> None:
        request, end = row.request, row.start + row.query_len
        assert request.status is Status.RUNNING and request.slot == row.slot
        assert row.query_len > 0 and row.start == self.starts[request]
        self.lengths[request] += len(row.new_tokens)
        assert len(row.new_tokens) <= MAX_UNSENT
        assert end <= self.lengths[request]
        has_all = end == self.lengths[request] and not request.unsent
        assert (row.num_draws > 0) == (has_all and request.max_new_tokens > 0)
        assert row.num_draws <= max(plan.num_steps, 1)
        self.starts[request] = end + max(row.num_draws - 1, 0)
        self.lengths[request] += row.num_draws
        assert self.lengths[request] <= len(request.prompt_ids) + request.max_new_tokens


# One thing at a time


def test_a_request_gets_its_naive_output():
    host = Host()
    request = host.add([0, 1, 2, 1, 0], max_new_tokens=9)
    host.run()
    assert request.output_ids == naive_output([0, 1, 2, 1, 0], 9)
    host.check_no_leak()


def test_there_is_nothing_to_schedule_without_requests():
    assert Host().scheduler.schedule() is None


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_request_may_want_no_token_at_all(overlaps):
    host = Host(chunk_size=3)
    request = host.add([0, 1, 2, 1, 0, 2, 2], max_new_tokens=0)
    host.run(overlaps)
    assert request.finish_reason is ENDED and request.output_ids == []
    host.check_no_leak()


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_stop_token_ends_a_request_and_the_step_behind_it_is_dropped(overlaps):
    expected = naive_output([1, 1, 2], 20, [2])
    assert len(expected) < 20
    host = Host()
    request = host.add([1, 1, 2], 20, stop_token_ids=[2])
    host.run(overlaps)
    assert request.output_ids == expected
    host.check_no_leak()


def test_an_overlapped_step_decodes_from_a_token_the_host_has_not_seen():
    host = Host()
    request = host.add([0, 1, 2])
    host.step(overlaps=True)
    plan = host.step(overlaps=True)
    assert plan is not None
    assert plan.rows[0][2:4] == (3, 1) and plan.rows[0].num_draws
    assert len(request.output_ids) == 1 and request.in_flight == 1


def test_a_long_prompt_is_read_in_chunks_and_drawn_from_at_its_end_only():
    host = Host(chunk_size=5)
    host.add([0, 1, 2] * 4, max_new_tokens=1)
    plans = [host.step() for _ in range(3)]
    rows = [
        (row.start, row.query_len, row.num_draws) for plan in plans if plan for row in plan.rows
    ]
    assert rows == [(0, 5, 0), (5, 5, 0), (10, 2, 1)]


def test_running_requests_decode_beside_a_prompt_that_is_being_read():
    host = Host(chunk_size=6)
    first = host.add([0, 1])
    host.step()
    second = host.add([2] * 11)
    plan = host.step()
    assert plan is not None
    assert [(row.request, row.query_len) for row in plan.rows] == [(first, 1), (second, 5)]


def test_unmixed_steps_read_prompts_first_and_decode_after():
    host = Host(chunk_size=6, mixes_decode=False)
    first = host.add([0, 1])
    host.step()
    second = host.add([2] * 11)
    rows = [plan.rows for plan in (host.step(), host.step(), host.step()) if plan]
    assert [[row.request for row in step] for step in rows] == [[second], [second], [first, second]]


def test_an_unchunked_prompt_waits_for_a_step_with_room_for_all_of_it():
    host = Host(chunk_size=8, can_chunk=False)
    first = host.add([0] * 5, max_new_tokens=2)
    second = host.add([1] * 8, max_new_tokens=1)
    lens = []
    while not host.scheduler.is_idle:
        plan = host.step()
        assert plan is not None
        lens.append([(row.request, row.query_len) for row in plan.rows])
    assert lens == [[(first, 5)], [(first, 1)], [(second, 8)]]


def test_an_unchunked_prompt_longer_than_any_step_is_cut_all_the_same():
    host = Host(chunk_size=8, can_chunk=False)
    host.add([0] * 20)
    host.add([1] * 3)
    host.run()
    host.check_outputs()


# Several steps in one launch


def test_rows_that_only_decode_take_several_steps_in_one_launch():
    host = Host(decode_steps=4)
    first, second = host.add([0, 1, 2], max_new_tokens=12), host.add([1, 2], max_new_tokens=3)
    plans = [plan for plan in (host.step() for _ in range(10)) if plan]
    draws = [[row.num_draws for row in plan.rows] for plan in plans]
    assert [plan.num_steps for plan in plans] == [0, 4, 4, 1, 1, 1]
    assert draws == [[1, 1], [4, 2], [4], [1], [1], [1]]
    assert len(first.output_ids) == 12 and len(second.output_ids) == 3
    host.check_outputs()
    host.check_no_leak()


def test_the_page_that_a_launch_comes_to_need_is_in_its_row():
    host = Host(decode_steps=4, page_size=4)
    host.add([0, 1], max_new_tokens=9)
    plans = [plan for plan in (host.step() for _ in range(3)) if plan]
    assert [bool(plan.rows[0].new_page) for plan in plans] == [False, True, True]
    host.run()
    host.check_outputs()


def test_a_launch_is_one_step_while_somebody_could_join_or_waits_for_each_token():
    host = Host(decode_steps=4, max_running_requests=2, num_pages=8)
    host.add([0, 1], max_new_tokens=30)
    host.step()
    host.add([2] * 20, max_new_tokens=12)  # has a slot, and no pages
    plan = host.step()
    assert plan is not None and plan.num_steps == 1
    streams = Host(decode_steps=4)
    streams.add([0, 1], max_new_tokens=30).stream_interval = 2
    assert [plan.num_steps for plan in (streams.step(), streams.step()) if plan] == [0, 1]
    for each in (host, streams):
        each.run()
        each.check_outputs()


def test_a_long_queue_is_admitted_by_groups_and_a_short_one_at_once():
    host = Host(max_running_requests=32, chunk_size=256, num_pages=400)
    for index in range(32):
        host.add([index % 3, 1], max_new_tokens=2 if index == 0 else 30)
    waiting = [host.add([2, 2], max_new_tokens=3) for _ in range(3)]
    host.step()
    host.step()  # the first has ended: one slot is free, a group is two
    plan = host.step()
    assert plan is not None and not plan.admitted and host.scheduler.num_waiting == 3
    for request in waiting[1:]:
        host.abort(request)
    plan = host.step()
    assert plan is not None and plan.admitted == (waiting[0],)
    host.run()
    host.check_outputs()
    host.check_no_leak()


def test_a_launch_has_at_most_one_page_for_a_request():
    with pytest.raises(ValueError, match="decode_steps: expected at most 4, got 5"):
        Host(decode_steps=5, page_size=4)


# Prefixes


def test_a_prefix_is_shared_by_the_step_that_first_reads_it():
    host = Host(chunk_size=32)
    first, second = host.add([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]), host.add([0, 1, 2, 0, 1, 2, 0, 2, 2])
    plan = host.step()
    assert plan is not None
    assert [row.query_len for row in plan.rows] == [10, 5]
    assert (first.num_cached, second.num_cached) == (0, 4)
    assert first.pages[0] == second.pages[0]
    host.run()
    host.check_outputs()
    host.check_no_leak()


def test_a_later_chunk_is_shared_by_a_request_admitted_in_its_step():
    host = Host(chunk_size=10)
    host.add([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    host.step()
    late = host.add([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 1])
    host.step()
    assert late.num_cached == 12


def test_a_page_whose_last_token_the_host_has_not_seen_is_not_cached():
    host = Host(page_size=1)
    request = host.add([0, 1, 2])
    host.submit()
    host.submit()  # reads the token drawn by the step before
    assert (request.num_computed, request.num_tokens, request.in_flight) == (4, 3, 2)
    host.abort(request)
    assert host.scheduler.kv.tree.num_evictable == 3
    host.collect()
    host.collect()
    host.check_no_leak()


def test_of_equal_prompts_in_a_step_one_is_read_and_of_the_others_their_last_token():
    host = Host()
    requests = [host.add([0, 1, 2, 0, 1, 2, 0, 1]) for _ in range(3)]
    plan = host.step()
    assert plan is not None and len({tuple(request.pages) for request in requests}) == 1
    assert [(row.query_len, row.write_start) for row in plan.rows] == [(8, 0), (1, 8), (1, 8)]
    host.run()
    host.check_outputs()


def test_the_whole_prompt_is_never_taken_from_the_cache():
    host = Host()
    for _ in range(2):
        request = host.add([0, 1, 2, 0, 1, 2, 0, 1])
        host.run()
    assert request.num_cached == 7
    host.check_outputs()


def test_a_conversation_finds_its_last_answer_in_the_cache():
    host = Host()
    first = host.add([0, 1, 2, 0, 1], max_new_tokens=11)
    host.run(overlaps=True)
    second = host.add([*first.token_ids, 1, 2], max_new_tokens=4)
    host.run(overlaps=True)
    assert second.num_cached == 12  # full pages of the 15 computed tokens
    host.check_outputs()


def test_an_answer_is_cached_behind_a_page_that_another_request_cached_first():
    host = Host()
    prompt = [0, 1, 2, 0, 1, 2, 0, 1]  # its last page is computed twice: never the whole prompt
    first, second = host.add(prompt, max_new_tokens=1), host.add(prompt, max_new_tokens=9)
    host.run()
    third = host.add(list(second.token_ids), max_new_tokens=1)
    host.run()
    assert (first.num_cached, second.num_cached, third.num_cached) == (0, 7, 16)
    host.check_outputs()
    host.check_no_leak()


def test_prefixes_can_be_kept_apart():
    host = Host(shares_prefixes=False)
    for _ in range(3):
        assert host.add([0, 1, 2] * 3).num_cached in (None, 0)
    host.run()
    assert [request.num_cached for request in host.requests] == [0, 0, 0]
    host.check_outputs()
    assert host.scheduler.kv.pool.num_free == 64


def test_the_prefix_of_a_request_that_broke_is_forgotten():
    host = Host(chunk_size=32)
    broken = host.add([0, 1, 2] * 5)
    host.runner.broken_rids.add(broken.rid)
    host.run()
    assert broken.finish_reason is BROKEN
    healthy = host.add([0, 1, 2] * 5)
    host.run()
    assert healthy.num_cached == 0
    host.check_outputs()
    host.check_no_leak()


def test_flushing_is_refused_while_a_request_runs_or_waits():
    host = Host()
    host.add([0, 1, 2] * 3)
    assert not host.scheduler.flush_cache()
    host.step()
    assert not host.scheduler.flush_cache()
    host.run()
    assert host.scheduler.flush_cache()
    again = host.add([0, 1, 2] * 3)
    host.run()
    assert again.num_cached == 0


# Pressure


@pytest.mark.parametrize("overlaps", [False, True])
def test_retraction_sends_back_the_last_comer_and_loses_nothing(overlaps):
    host = Host(num_pages=6, shares_prefixes=False, conservativeness=0.0)
    first, second = host.add([0, 1], max_new_tokens=20), host.add([1, 0], max_new_tokens=20)
    host.run(overlaps)
    assert first.num_retractions == 0 and second.num_retractions > 0
    host.check_outputs()
    host.check_no_leak()


def test_a_retracted_request_waits_for_its_token_in_flight():
    host = Host(num_pages=3, shares_prefixes=False, learns=False)
    first, second = host.add([0] * 3), host.add([1] * 7, max_new_tokens=4)
    for _ in range(2):
        host.step(overlaps=True)  # now the first needs a second page, the second a third
    plan = host.scheduler.schedule()
    assert plan is not None and [row.request for row in plan.rows] == [first]
    assert second.num_retractions == 1 and second.in_flight == 1
    host.abort(first)
    assert host.scheduler.schedule() is None
    host.collect()
    plan = host.scheduler.schedule()
    assert plan is not None and plan.rows[0].query_len == 9


def test_nothing_is_sent_back_where_a_page_is_about_to_come_free():
    host = Host(num_pages=3, shares_prefixes=False, learns=False)
    first, second = host.add([0] * 5, max_new_tokens=2), host.add([1] * 3)
    for _ in range(2):
        host.step(overlaps=True)
    assert not first.can_run and first.in_flight == 1
    assert host.step(overlaps=True) is None
    host.run(overlaps=True)
    assert second.num_retractions == 0
    host.check_outputs()


def test_a_request_as_large_as_the_pool_ends_though_its_twin_has_cached_the_same_pages():
    for prompt_len in range(1, 12):
        host = Host(num_pages=4, page_size=4)
        prompt = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1][:prompt_len]
        for max_new_tokens in (1, 17 - prompt_len, 17 - prompt_len):
            host.add(prompt, max_new_tokens)
        host.run(overlaps=True)
        host.check_outputs()
        host.check_no_leak()


def test_a_request_larger_than_the_pool_is_refused():
    host = Host(num_pages=4, page_size=4)
    host.add([0] * 10, max_new_tokens=7)  # the last token needs no page
    with pytest.raises(ValueError, match="request 1: expected at most 4 pages.* got 5"):
        host.add([0] * 10, max_new_tokens=8)


def test_admission_leaves_room_for_the_growth_of_what_runs():
    host = Host(num_pages=10, conservativeness=10.0)
    first, second = host.add([0], max_new_tokens=30), host.add([1], max_new_tokens=30)
    host.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    host.run()
    assert second.num_retractions == 0


def test_aborted_requests_give_back_slot_and_pages_wherever_they_stand():
    host = Host(max_running_requests=2, chunk_size=4)
    reading, running, waiting = host.add([0] * 9), host.add([1] * 2), host.add([2] * 3)
    host.step(overlaps=True)
    assert host.flying
    for request in (reading, running, waiting):
        host.abort(request)
    assert host.scheduler.is_idle
    again = host.add([2] * 3)
    host.run(overlaps=True)
    assert again.finish_reason is ENDED
    host.check_outputs()
    host.check_no_leak()


# Policies


def order_of_admission(host: Host) -> list[int]:
    host.run()
    return [host.requests.index(request) for request in host.admitted]


def one_by_one(**options: Any) -> Host:
    host = Host(max_running_requests=1, **options)
    host.add([2, 2, 2, 2, 2], max_new_tokens=2)
    host.step()
    return host


def test_first_come_is_first_served():
    host = one_by_one()
    for max_new_tokens in (1, 9, 4):
        host.add([0], max_new_tokens)
    assert order_of_admission(host) == [0, 1, 2, 3]


def test_longest_output_first():
    host = one_by_one(policy="lof")
    for max_new_tokens in (1, 9, 4):
        host.add([0], max_new_tokens)
    assert order_of_admission(host) == [0, 2, 3, 1]


def test_longest_cached_prefix_first_and_arrival_where_they_are_equal():
    host = one_by_one(policy="lpm")
    aborted = host.add([2, 2, 2, 2, 2, 1, 1, 1, 1])
    for prompt in ([0] * 9, [1] * 9, [2] * 9):
        host.add(prompt, max_new_tokens=1)
    host.abort(aborted)
    assert order_of_admission(host) == [0, 4, 2, 3]


def test_random_order_follows_its_seed():
    orders = []
    for seed in (0, 0, 1):
        host = one_by_one(policy="random", random_seed=seed)
        for _ in range(12):
            host.add([0], max_new_tokens=1)
        orders.append(order_of_admission(host))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(13))


def test_priority_comes_before_the_longest_cached_prefix():
    host = one_by_one(policy="lpm", uses_priority=True)
    host.add([2] * 9, max_new_tokens=1)
    host.add([0] * 9, max_new_tokens=1, priority=1)
    assert order_of_admission(host) == [0, 2, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"uses_priority": True}, [0, 2, 3, 1]),
        ({"uses_priority": True, "low_priority_first": True}, [0, 1, 3, 2]),
        ({"uses_priority": True, "policy": "lof"}, [0, 2, 3, 1]),
    ],
)
def test_priority_comes_before_the_policy(options, expected):
    host = one_by_one(**options)
    for priority, max_new_tokens in ((0, 9), (2, 1), (1, 5)):
        host.add([0], max_new_tokens, priority=priority)
    assert order_of_admission(host) == expected


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy: expected one of .*fcfs.*, got 'best'"):
        Host(policy="best")


# The device of this test rings its alarms


def test_the_fake_device_notices_an_aliased_page():
    host = Host(shares_prefixes=False)
    first, second = host.add([0] * 5), host.add([1] * 5)
    plan = host.scheduler.schedule()
    assert plan is not None
    second.pages[0] = first.pages[0]
    with pytest.raises(AssertionError, match="overwrites what is in use"):
        host.runner.submit(plan)


def test_the_fake_device_notices_a_wrong_share():
    host = Host()
    host.add([0] * 5)
    plan = host.scheduler.schedule()
    assert plan is not None
    host.runner.submit(plan)
    host.add([0] * 5)
    plan = host.scheduler.schedule()
    assert plan is not None and plan.rows[-1].start == 4
    host.requests[-1].prompt_ids[0] = 1
    with pytest.raises(AssertionError, match="reads foreign tokens"):
        host.runner.submit(plan)


def test_a_lost_page_is_noticed():
    host = Host()
    host.add([0] * 5)
    host.step()
    host.scheduler.running[0].pages.pop()
    with pytest.raises(RuntimeError, match="lost"):
        host.scheduler.check_integrity()


# Everything at once

MAX_PROMPT, MAX_NEW = 14, 12

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=MAX_PROMPT)


@st.composite
def options(draw) -> dict[str, Any]:
    page_size = draw(st.integers(1, 8))
    least = -(-(MAX_PROMPT + MAX_NEW - 1) // page_size)  # room for the longest request, alone
    return {
        "page_size": page_size,
        "num_pages": draw(st.sampled_from([least, least + 1, 2 * least, 8 * least])),
        "max_running_requests": draw(st.sampled_from([1, 2, 3, 4, 5, 6, 32])),
        "chunk_size": draw(st.sampled_from([1, 2, 3, 5, 7, 16, 64])),
        "can_chunk": draw(st.booleans()),
        "mixes_decode": draw(st.booleans()),
        "policy": draw(st.sampled_from(["fcfs", "fcfs", "lpm", "lof", "random"])),
        "uses_priority": draw(st.booleans()),
        "low_priority_first": draw(st.booleans()),
        "shares_prefixes": draw(st.sampled_from([True, True, False])),
        "conservativeness": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "decode_steps": draw(st.integers(1, min(page_size, 4))),
        "max_decode_rows": draw(st.sampled_from([None, 2])),
        "learns": draw(st.booleans()),
    }


class AnyOrderOfEvents(RuleBasedStateMachine):
    @initialize(options=options())
    def start(self, options: dict[str, Any]) -> None:
        self.host = Host(**options)

    @rule(
        prompt_ids=PROMPTS,
        max_new_tokens=st.integers(0, MAX_NEW),
        stops=st.booleans(),
        priority=st.integers(0, 2),
        copies=st.integers(1, 3),
        skips_forced=st.booleans(),
    )
    def add(self, prompt_ids, max_new_tokens, stops, priority, copies, skips_forced) -> None:
        for _ in range(copies):
            self.host.add(
                prompt_ids,
                max_new_tokens,
                priority=priority,
                stop_token_ids=[2] if stops else [],
                skips_forced=skips_forced,
            )

    @precondition(lambda self: self.host.has_room_for_groups)
    @rule(
        prompts=st.lists(PROMPTS, min_size=2, max_size=4),
        max_new_tokens=st.integers(0, MAX_NEW),
        stops=st.booleans(),
    )
    def add_group(self, prompts, max_new_tokens, stops) -> None:
        with contextlib.suppress(ValueError):  # too large, be it alone
            self.host.add_group(prompts, max_new_tokens, stop_token_ids=[2] if stops else [])

    @precondition(lambda self: self.host.requests)
    @rule(data=st.data(), max_new_tokens=st.integers(0, MAX_NEW))
    def continue_a_conversation(self, data, max_new_tokens) -> None:
        earlier = data.draw(st.sampled_from(self.host.requests))
        self.host.add(list(earlier.token_ids[:MAX_PROMPT]), max_new_tokens)

    @rule(num_steps=st.integers(1, 8), overlaps=st.booleans())
    def step(self, num_steps, overlaps) -> None:
        for _ in range(num_steps):
            while len(self.host.flying) > 1:
                self.host.collect()
            self.host.step(overlaps)

    @precondition(lambda self: len(self.host.flying) <= 1)
    @rule()
    def submit(self) -> None:
        self.host.submit()

    @precondition(lambda self: self.host.flying)
    @rule()
    def collect(self) -> None:
        self.host.collect()

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self.host.abort(data.draw(st.sampled_from(self.host.live)))

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def break_one(self, data) -> None:
        self.host.runner.broken_rids.add(data.draw(st.sampled_from(self.host.live)).rid)

    @rule()
    def flush(self) -> None:
        assert self.host.scheduler.flush_cache() == (not self.host.live)

    @rule()
    def change_weights(self) -> None:
        self.host.runner.weights += 1  # what was written before must not be read again
        num_running = len(self.host.scheduler.running)
        assert self.host.scheduler.start_over() == num_running
        assert not list(self.host.scheduler.kv.tree.nodes())

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "host"):
            self.host.scheduler.check_integrity()
            assert self.host.scheduler.num_waiting + len(self.host.scheduler.running) == len(
                self.host.live
            )

    def teardown(self) -> None:
        if hasattr(self, "host"):
            while self.host.flying:
                self.host.collect()
            most = sum(len(r.prompt_ids) + r.max_new_tokens for r in self.host.requests)
            self.host.run(overlaps=True, limit=50 + 4 * most)
            self.host.check_outputs()
            self.host.check_no_leak()


AnyOrderOfEvents.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
test_any_order_of_events_gives_every_request_its_output = AnyOrderOfEvents.TestCase


@pytest.mark.parametrize("decode_steps", [1, 3])
@pytest.mark.parametrize("overlaps", [False, True])
def test_ten_thousand_steps_under_pressure_lose_nothing(overlaps, decode_steps):
    rng = random.Random(0)
    options = dict(num_pages=18, page_size=4, max_running_requests=8, decode_steps=decode_steps)
    host = Host(**options, learns=False)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 20))] for _ in range(12)]
    for _ in range(10_000):
        if len(host.live) < 12:
            tail = [rng.randrange(3) for _ in range(rng.randint(0, 6))]
            skips_forced = rng.random() < 0.3
            host.add(rng.choice(prompts) + tail, rng.randint(0, 40), skips_forced=skips_forced)
        if len(host.live) < 12 and rng.random() < 0.3:
            pair = [rng.choice(prompts), rng.choice(prompts)]
            host.add_group(pair, rng.randint(0, 15))
        if rng.random() < 0.02 and host.live:
            host.abort(rng.choice(host.live))
        host.step(overlaps)
    host.run(overlaps)
    host.check_outputs()
    assert sum(request.num_retractions for request in host.requests) > 800
    assert sum(request.num_cached or 0 for request in host.requests) > 2000
    host.check_no_leak()
