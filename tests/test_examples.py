import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest
from numerics import OPTIMIZED

import jaxengine
from jaxengine.engine import Engine
from jaxengine.hub import resolve_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OFFLINE = sorted(path.name for path in EXAMPLES.glob("offline_*.py"))


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    """One for all, with few steps to compile; those of the examples would take longer. As they
    generate much with the whole model, it is compiled for that."""
    sizes: dict[str, Any] = dict(
        context_length=256, max_running_requests=8, chunked_prefill_size=32
    )
    compile_quickly = jax.stages.Lowered.compile
    optimize = lambda lowered, **_: compile_quickly(lowered, compiler_options=OPTIMIZED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", optimize)
        engine = Engine(**sizes, cuda_graph_bs=[8], show_progress=False, random_seed=0)
    with engine:
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


@pytest.fixture
def run_example(
    shared_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example as a program of its own would, but for the engine; returns what it prints."""

    def run(name: str, *words: str) -> str:
        made: list[dict[str, Any]] = []
        lend = lambda **given: made.append(given) or Lent(shared_engine)
        monkeypatch.setattr(jaxengine, "Engine", lend)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert [given["model_path"] for given in made] == [None]
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs_as_it_stands(
    name: str, shared_engine: Engine, run_example: Callable[[str], str]
) -> None:
    out = run_example(name)
    assert "'The import statement' goes on:\n" in out and len(out) > 200
    assert shared_engine.get_server_info()["internal_states"][0]["num_running"] == 0


def test_scores_tell_sense_from_nonsense(run_example: Callable[..., str], tmp_path: Path) -> None:
    out = run_example("scoring.py", "--report", str(tmp_path / "scores.html"))
    assert "likeliest: is executed in two steps." in out
    assert "The import statement is a kind of fruit." in out
    page = (tmp_path / "scores.html").read_text(encoding="utf-8")
    assert page.count('id="result-') == 3 and "fruit" in page


def test_the_reward_rises_with_each_round_of_training(
    shared_engine: Engine, run_example: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "jit", partial(jax.jit, compiler_options=OPTIMIZED))
    words = ("--rounds", "2", "--samples", "64", "--steps", "8")
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax is not strict
            out = run_example("rejection_sampling.py", *words)
    finally:
        assert shared_engine.update_weights_from_disk(str(resolve_model(None))).success
    rewards = [float(number) for number in re.findall(r"the reward is ([0-9.]+)", out)]
    assert len(rewards) == 3 and rewards[0] < rewards[1] < rewards[2], rewards
    assert rewards[2] > 2 * rewards[0]


def test_the_demo_shows_text_speed_and_what_to_type_next(
    run_example: Callable[[str], str],
) -> None:
    out = run_example("demo.py")
    lines = out.splitlines()
    assert "loading the embedded model on" in lines[0]
    assert "\nThe import statement " in out
    assert re.search(r"\nYou: What is the json module\?\nModel: .{20}", out)
    assert re.search(r"\n32 completions at once: \d+ tokens in .* s, \d+ tok/s\n", out)
    assert "jaxengine chat" in lines[-4] and "README.md" in lines[-1]


@pytest.mark.parametrize("folder", ["jaxengine", "models", "pallas_kernels"])
def test_the_map_in_the_readme_names_every_source_file(folder: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"[a-z0-9_]+\.py(?=`)", readme))
    assert files <= named, f"not on the map: {sorted(files - named)}"


def test_the_readme_speaks_of_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in str(path)}
    assert set(re.findall(r"`(?:\w+/)*(\w+\.py)`", readme)) <= known
