import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxengine
from jaxengine.engine import Engine

ROOT = Path(__file__).parents[1]
OFFLINE = sorted(path.name for path in (ROOT / "examples").glob("offline_*.py"))


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    """One for all, with few steps to compile; those of the examples would take longer."""
    sizes = dict(context_length=256, max_running_requests=4, chunked_prefill_size=32)
    with Engine(**sizes, cuda_graph_bs=[4], show_progress=False, random_seed=0) as engine:
        yield engine


class Lent:
    """An engine that several programs take for their own."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __enter__(self) -> "Lent":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        pass


def test_the_four_modes_each_have_an_example() -> None:
    kinds = ("async", "async_streaming", "batch", "streaming")
    assert OFFLINE == [f"offline_{kind}.py" for kind in kinds]


@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs_as_it_stands(
    name: str,
    shared_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = []
    monkeypatch.setattr(
        jaxengine, "Engine", lambda **given: made.append(given) or Lent(shared_engine)
    )
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    assert made == [{"model_path": None}]
    assert "'The import statement' goes on:\n" in out and len(out) > 200
    assert shared_engine.get_server_info()["internal_states"][0]["num_running"] == 0


def test_the_demo_shows_text_speed_and_what_to_type_next() -> None:
    cache = jax.config.values["jax_compilation_cache_dir"]
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAXENGINE_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "loading the embedded model on" in lines[0]
    assert "\nThe import statement " in done.stdout
    assert "\nYou: What is the json module?\nModel: " in done.stdout
    assert "completions at once:" in done.stdout and " tok/s" in done.stdout
    assert "jaxengine chat" in lines[-4] and "README.md" in lines[-1]
