"""Engines begin, fail, are interrupted, forgotten and shut down: nothing hangs, leaks or harms
another."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import InBackground, num_unfinished

from jaxengine import Engine, ServerArgs
from jaxengine.runner import Runner

ROOT = Path(__file__).parents[1]
PROMPT = "The import statement"
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxengine")]


def ids_of(engine: Engine, prompt: Any = (1, 2, 3), params: Any = SHORT, **arguments: Any) -> Any:
    return engine.generate(input_ids=prompt, sampling_params=params, **arguments)["output_ids"]


# The end


def test_a_shut_down_engine_says_so_and_may_be_shut_down_again(make_engine):
    with make_engine() as engine:
        expected = ids_of(engine)
        assert len(expected) == 4
    for use in (
        lambda: ids_of(engine),
        lambda: ids_of(engine, stream=True),
        engine.flush_cache,
        lambda: engine.abort(abort_all=True),
    ):
        with pytest.raises(RuntimeError, match="was shut down and takes no more requests"):
            use()
    assert engine.get_server_info()["status"] == "stopped"
    engine.shutdown()
    engine.shutdown()
    assert ids_of(make_engine()) == expected, "a new one is as good"


def test_a_shutdown_ends_waiting_calls_and_streams(make_engine):
    engine = make_engine()
    stream = engine.generate(input_ids=[1], sampling_params=LONG, stream=True)
    next(stream)
    call = InBackground(
        engine, lambda: engine.generate(input_ids=[[1], [2], [3]], sampling_params=LONG)
    )
    engine.shutdown()
    results = [*call.join().result, *stream]
    reasons = [result["meta_info"]["finish_reason"] for result in results]
    assert {(reason["type"], reason["message"]) for reason in reasons} == {
        ("abort", "the engine was shut down")
    }
    assert engine._loop.num_live == 0


def test_no_call_hangs_that_meets_a_shutdown(make_engine):
    engine = make_engine()

    def call_until_the_end(_: int) -> str:
        while True:
            try:
                engine.generate(input_ids=[1], sampling_params=SHORT)
            except RuntimeError as error:
                return str(error)

    with ThreadPoolExecutor(8) as threads:
        said = threads.map(call_until_the_end, range(8))
        time.sleep(0.3)
        engine.shutdown()
        assert all("was shut down" in message for message in said)


def test_the_context_manager_lets_errors_out(make_engine):
    with pytest.raises(ZeroDivisionError), make_engine() as engine:
        raise ZeroDivisionError
    assert not engine._loop.is_alive


def test_a_forgotten_engine_ends_and_gives_its_memory_back(make_engine):
    engine = make_engine()
    loop = engine._loop
    arrays = loop.runner._params
    stream = engine.generate(input_ids=[1], sampling_params=LONG, stream=True)
    del engine
    gc.collect()
    assert loop.is_alive and next(stream), "its stream keeps it alive"
    del stream
    gc.collect()
    assert not loop.is_alive and all(array.is_deleted() for array in arrays)


def test_threads_end_with_their_engine(make_engine):
    before = own_threads()
    engine = make_engine(watchdog_timeout=60)
    assert len(own_threads()) == len(before) + 2
    engine.shutdown()
    deadline = time.monotonic() + 5
    while own_threads() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert own_threads() == before


def test_two_engines_work_side_by_side(make_engine):
    one, two = make_engine(), make_engine(json_model_override_args='{"rms_norm_eps": 0.5}')
    alone = [ids_of(engine, params=LONG) for engine in (one, two)]
    assert alone[0] != alone[1]
    call = InBackground(one, lambda: ids_of(one, params=LONG))
    assert ids_of(two, params=LONG) == alone[1]
    two.shutdown()
    assert call.join().result == alone[0] == ids_of(one, params=LONG)
    assert one.get_server_info()["num_compilations_since_start"] == 0


# The beginning


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model_path": "/nowhere"}, ValueError, "model_path"),
        ({"page_sizes": 4}, TypeError, "did you mean 'page_size'"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"server_args": ServerArgs()}, TypeError, "give server_args or fields of it, not both"),
        ({"preferred_sampling_params": '{"topp": 1}'}, TypeError, "^preferred_.*'top_p'"),
        ({"preferred_sampling_params": '{"top_p": 2}'}, ValueError, "^preferred_.*top_p"),
        ({"json_model_override_args": '{"rope_theta": "x"}'}, ValueError, "rope_theta"),
    ],
)
def test_what_cannot_be_made_leaves_no_thread(make_engine, arguments, kind, message):
    before = own_threads()
    with pytest.raises(kind, match=message):
        make_engine(**arguments)
    assert own_threads() == before


def test_a_start_that_fails_late_leaves_no_thread(make_engine, monkeypatch):
    def fail(self: Any) -> None:
        raise MemoryError("no room")

    before = own_threads()
    monkeypatch.setattr(Runner, "warm_up", fail)
    with pytest.raises(MemoryError, match="no room"):
        make_engine()
    assert own_threads() == before


def test_server_args_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="server_args: expected a ServerArgs, got 'x'"):
        Engine(server_args="x")  # type: ignore[arg-type]


def test_arguments_may_come_as_one_object(make_engine):
    args = make_engine().server_args
    with Engine(server_args=args) as engine:
        assert engine.server_args is args and len(ids_of(engine)) == 4


def test_without_a_tokenizer_there_are_ids_only(make_engine):
    engine = make_engine()
    result = engine.generate(input_ids=[1, 2], sampling_params=SHORT)
    assert result.keys() == {"output_ids", "meta_info"} and engine.tokenizer is None
    chunks = list(engine.generate(input_ids=[1, 2], sampling_params=SHORT, stream=True))
    assert chunks[-1]["output_ids"] == result["output_ids"]
    with pytest.raises(ValueError, match="^prompt: this engine has no tokenizer .*input_ids"):
        engine.generate("text")
    with pytest.raises(ValueError, match="^stop: needs text.* use stop_token_ids"):
        engine.generate(input_ids=[1], sampling_params={"stop": "x"})
    stop = result["output_ids"][1]
    stopped = ids_of(engine, [1, 2], {"temperature": 0, "stop_token_ids": [stop]})
    assert stopped[-1] == stop and len(stopped) <= 2


def test_priorities_go_first(make_engine):
    engine = make_engine(enable_priority_scheduling=True, max_running_requests=1, cuda_graph_bs=[1])
    order = []
    for chunk in engine.generate(
        input_ids=[[1], [2], [3]], sampling_params=SHORT, priority=[1, 3, 2], stream=True
    ):
        if chunk["meta_info"]["finish_reason"]:
            order.append(chunk["index"])
    assert order == [1, 2, 0]


def test_a_full_queue_refuses_a_call_as_a_whole(make_engine):
    engine = make_engine(max_queued_requests=2)
    with pytest.raises(ValueError, match="max_queued_requests = 2"):
        engine.generate(input_ids=[[1], [2], [3]], sampling_params=SHORT)
    assert num_unfinished(engine) == 0 and len(ids_of(engine)) == 4


# Signals and exit


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_interrupts_a_call_and_leaves_the_engine_usable(text_engine, stream):
    long = LONG | {"max_new_tokens": 500}
    expected = text_engine.generate(PROMPT, SHORT)["text"]
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        for _ in text_engine.generate([PROMPT] * 6, long, stream=stream):
            pass
    assert num_unfinished(text_engine) == 0
    assert text_engine.generate(PROMPT, SHORT)["text"] == expected


@contextmanager
def in_a_process(script: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process running `script`, once it has printed a line; and that line."""
    prelude = """
        import os, sys, weakref
        class Early: pass
        early = Early()
        weakref.finalize(early, int)  # so that finalizers run after what JAX does at exit
        sys.path[:0] = [".", "tests"]
        import conftest
        from engines import SMALL, num_unfinished
        from jaxengine import Engine
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def seconds_to_leave() -> float:
    """Four, since the load is known a minute late, and as much longer as a busy machine takes to
    tear all the modules down."""
    return 4 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_the_interpreter_leaves_at_once_whatever_runs():
    script = """
        import threading
        engine = Engine(**SMALL)
        long = {"max_new_tokens": 400, "ignore_eos": True}
        stream = engine.generate(["a"] * 8, long, stream=True)
        next(stream)
        call = lambda: engine.generate("a", long)
        threading.Thread(target=call, daemon=True).start()
        while num_unfinished(engine) < 9: pass
        print("leaving", flush=True)
    """
    with in_a_process(script) as (process, said):
        started = time.monotonic()
        rest, _ = process.communicate(timeout=60)
        spent = time.monotonic() - started
    assert (said, rest, process.returncode) == ("leaving\n", "", 0)
    assert spent < seconds_to_leave()


def test_ctrl_c_ends_a_program_that_does_not_catch_it():
    script = """
        engine = Engine(**SMALL)
        stream = engine.generate("a", {"max_new_tokens": 400, "ignore_eos": True}, stream=True)
        next(stream)
        print("waiting", flush=True)
        engine.generate(["a"] * 50, {"max_new_tokens": 400, "ignore_eos": True})
    """
    with in_a_process(script) as (process, said):
        assert said == "waiting\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        spent = time.monotonic() - started
    assert rest.strip().endswith("KeyboardInterrupt") and rest.count("Traceback") == 1
    assert process.returncode == -signal.SIGINT and spent < seconds_to_leave()
