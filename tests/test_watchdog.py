"""A loop that hangs is reported once; an idle one never."""

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from jaxengine import watchdog
from jaxengine.watchdog import Watchdog


class HangingLoop:
    """Claims unfinished requests and a last step long ago, for as long as the test runs."""

    def __init__(self, num_live: int, is_halted: bool):
        self.num_live = num_live
        self.last_step_time = time.monotonic() - 100
        self.scheduler = SimpleNamespace(is_halted=is_halted)
        self.num_looks = 0

    def wait_for_end(self, timeout: float) -> bool:
        self.num_looks += 1
        return self.num_looks > 3


@pytest.mark.parametrize(
    ("num_live", "is_halted", "num_reports"),
    [(2, False, 1), (0, False, 0), (2, True, 0)],
    ids=["hung", "idle", "paused"],
)
def test_a_hang_is_reported_once(
    num_live: int,
    is_halted: bool,
    num_reports: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: None)
    with caplog.at_level(logging.ERROR, logger="jaxengine"):
        Watchdog(HangingLoop(num_live, is_halted), timeout_s=1)._watch()  # type: ignore[arg-type]
    assert len(caplog.records) == num_reports
    assert all("no step for 100 s with 2 unfinished" in r.getMessage() for r in caplog.records)
