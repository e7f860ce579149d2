"""Ctrl-C during a garbage collection, and whose handler of it stays."""

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from jaxengine.interrupts import heeds_ctrl_c

ROOT = Path(__file__).parents[1]

PRESSED_IN = {
    "a callback of the collector": """
        gc.callbacks.append(lambda phase, info: press() if phase == "stop" else None)
        gc.collect()
    """,
    "a finalizer": """
        class Cycle:
            def __init__(self):
                self.itself = self
            def __del__(self):
                press()
        Cycle()
        gc.collect()
    """,
}


@pytest.mark.parametrize("place", PRESSED_IN)
def test_ctrl_c_is_not_lost_in(place: str):
    script = """
        import gc, signal, time
        from jaxengine.interrupts import heeds_ctrl_c
        presses = [signal.SIGINT]
        def press():
            if presses:
                signal.raise_signal(presses.pop())
        gc.collect()
        try:
            with heeds_ctrl_c():
                exec(PRESSED)
                print("goes on", flush=True)
                time.sleep(50)
        except KeyboardInterrupt:
            print("ends")
    """
    pressed = f"PRESSED = {textwrap.dedent(PRESSED_IN[place])!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", pressed + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert (done.stdout, done.stderr) == ("goes on\nends\n", "")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, print])
def test_the_handler_is_as_before(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with heeds_ctrl_c(), heeds_ctrl_c():
            is_ours = signal.getsignal(signal.SIGINT) is not handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_ours == (handler is signal.default_int_handler)


def test_a_handler_set_meanwhile_stays():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with heeds_ctrl_c():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_it_alone():
    before = signal.getsignal(signal.SIGINT)
    within = []

    def look():
        with heeds_ctrl_c():
            within.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert within == [before]


def test_ctrl_c_elsewhere_ends_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), heeds_ctrl_c():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")
    finally:
        signal.signal(signal.SIGINT, before)
