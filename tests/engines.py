"""Engines for tests, and their books checked after every step. A pytest plugin, so that the whole
session shares what is slow to make: one engine that speaks text, one tiny checkpoint."""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, by which NumPy knows bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxengine
from jaxengine.hub import resolve_model

_folders = tempfile.TemporaryDirectory()  # until the process ends


def _cut_model(num_layers: int) -> str:
    """The embedded model's first layers as a checkpoint: they compile and run in a fraction of the
    time, and whether it makes sense what they say matters to few tests."""
    whole = resolve_model(None)
    folder = Path(_folders.name) / f"{num_layers}-layers"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    kept = tuple(f"model.layers.{index}." for index in range(num_layers))
    tensors = {
        name: tensor
        for name, tensor in load_file(whole / "model.safetensors").items()
        if name.startswith(kept) or not name.startswith("model.layers.")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


CUT_MODEL = _cut_model(2)

SMALL: dict[str, Any] = dict(
    model_path=CUT_MODEL,
    max_running_requests=4,
    chunked_prefill_size=64,
    page_size=16,
    context_length=512,
    cuda_graph_bs=[4],
    random_seed=0,
    show_progress=False,
    device="cpu",
)
"""Sizes of the shared engine, for which few steps are compiled."""

TINY: dict[str, Any] = dict(
    max_running_requests=2,
    chunked_prefill_size=16,
    page_size=4,
    context_length=256,
    max_total_tokens=512,
    cuda_graph_bs=[2],
    skip_tokenizer_init=True,
    show_progress=False,
    device="cpu",
)
"""Sizes of the engines that one test makes for itself."""

NAN_TOKEN = 300  # its embedding in the tiny checkpoint is no number

MakeEngine = Callable[..., jaxengine.Engine]


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[jaxengine.Engine]:
    with jaxengine.Engine(**SMALL) as engine:
        check_books(engine)
        yield engine
        assert engine._loop.error is None


@pytest.fixture
def text_engine(shared_engine: jaxengine.Engine) -> Iterator[jaxengine.Engine]:
    """The shared engine, idle before and after: no test leaves a request or a page behind."""
    assert num_unfinished(shared_engine) == 0
    yield shared_engine
    loop = shared_engine._loop
    assert num_unfinished(shared_engine) == 0, "the test left a request running"
    assert shared_engine.flush_cache().success
    loop.call(loop.scheduler.check_integrity).result()
    assert loop.scheduler.kv.pool.num_free == loop.scheduler.kv.pool.num_pages


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_checkpoint, tiny_config  # slow, and few sessions need it

    folder = tmp_path_factory.mktemp("tiny")
    tensors = save_checkpoint(folder, tiny_config("qwen3"))
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def make_engine(tiny_checkpoint: Path) -> Iterator[MakeEngine]:
    """Engines on a tiny random model without a tokenizer, shut down afterwards."""
    made = []

    def make(**arguments: Any) -> jaxengine.Engine:
        engine = jaxengine.Engine(**{"model_path": str(tiny_checkpoint), **TINY, **arguments})
        made.append(engine._finalizer)  # it does not keep the engine alive
        check_books(engine)
        return engine

    yield make
    for shutdown in made:
        shutdown()


def check_books(engine: jaxengine.Engine) -> None:
    engine._loop.after_step.append(engine._loop.scheduler.check_integrity)


def num_unfinished(engine: jaxengine.Engine) -> int:
    """Requests that run or wait, once the loop has done what it was told before."""
    loop = engine._loop
    return loop.call(lambda: loop.num_live).result()


def settle(engine: jaxengine.Engine) -> None:
    """Returns once a paused engine has delivered what was under way."""
    before = None
    while before != engine._loop.num_steps:
        before = engine._loop.num_steps
        time.sleep(0.2)


class InBackground:
    """A call on a thread of its own, once the engine has heard of it; and what came of it."""

    def __init__(self, engine: jaxengine.Engine, call: Callable[[], Any]):
        self.result: Any = None
        self.error: BaseException | None = None
        before = num_unfinished(engine)
        self._thread = threading.Thread(target=self._run, args=[call])
        self._thread.start()
        while num_unfinished(engine) == before and self._thread.is_alive():
            time.sleep(0.001)

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def join(self) -> "InBackground":
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self
