"""One small engine for all tests of the public interface, on the embedded model; its books are
checked after every step. A pytest plugin, so that the whole session shares it."""

from collections.abc import Iterator
from typing import Any

import pytest

from jaxengine import Engine

SMALL: dict[str, Any] = dict(
    max_running_requests=4,
    chunked_prefill_size=64,
    page_size=16,
    context_length=512,
    cuda_graph_bs=[4],
    random_seed=0,
    show_progress=False,
    device="cpu",
)
"""Sizes for which two steps are compiled."""


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    with Engine(**SMALL) as engine:
        loop = engine._loop
        loop.after_step = loop.scheduler.check_integrity
        yield engine
        assert loop.error is None


@pytest.fixture
def demo_engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine, idle before and after: no test leaves a request or a page behind."""
    assert num_unfinished(shared_engine) == 0
    yield shared_engine
    loop = shared_engine._loop
    assert num_unfinished(shared_engine) == 0, "the test left a request running"
    assert shared_engine.flush_cache().success
    loop.call(loop.scheduler.check_integrity).result()
    assert loop.scheduler.pool.num_free == loop.scheduler.pool.num_pages


def num_unfinished(engine: Engine) -> int:
    """Requests that run or wait, once the loop has done what it was told before."""
    loop = engine._loop
    return loop.call(lambda: loop.num_live).result()
