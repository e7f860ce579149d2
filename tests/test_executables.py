"""Executables that outlive a process: found without tracing, and never a wrong one."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxengine import executables, step_programs
from jaxengine.executables import Executables
from jaxengine.fingerprint import fingerprint
from jaxengine.models import layers

SHAPE = jax.ShapeDtypeStruct((1000,), jnp.float32)
TREES: dict[str, Any] = dict(
    in_tree=jax.tree.structure(((SHAPE,), {})), out_tree=jax.tree.structure((SHAPE, SHAPE))
)


def use_jax_cache(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # else JAX stays with the first one


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    before = jax.config.values["jax_compilation_cache_dir"]
    use_jax_cache(str(tmp_path))
    yield tmp_path / "executables"
    use_jax_cache(before)


def forget(folder: Path) -> None:
    """Empties JAX's own cache beside the folder."""
    for file in folder.parent.iterdir():
        if file.is_file():
            file.unlink()


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "jaxengine")  # an engine of another test may have said less


@pytest.fixture
def cache() -> Executables:
    return Executables(jax.devices()[0])


def tracer(traced: list[float], factor: float) -> Callable[[], Callable[[], Any]]:
    def trace() -> Callable[[], Any]:
        traced.append(factor)
        program = jax.jit(lambda x: (x * factor, x + 1), donate_argnums=0)
        return program.lower(SHAPE).compile

    return trace


def doubled(executable: Any) -> np.ndarray:
    x = jnp.arange(1000, dtype=jnp.float32)
    out, _ = executable(x)
    assert x.is_deleted(), "the argument was donated"
    return np.asarray(out)


def test_what_one_start_compiled_the_next_one_loads_untraced(cache: Executables) -> None:
    traced: list[float] = []
    for _ in range(2):
        executable = cache.through("double", **TREES, trace=tracer(traced, 2.0))()
        np.testing.assert_array_equal(doubled(executable), 2.0 * np.arange(1000))
        assert executable.memory_analysis().alias_size_in_bytes == 4000
    assert traced == [2.0]
    other = cache.through("triple", **TREES, trace=tracer(traced, 3.0))()
    np.testing.assert_array_equal(doubled(other), 3.0 * np.arange(1000))
    assert traced == [2.0, 3.0]


def test_other_code_has_other_executables(
    cache: Executables, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[float] = []
    cache.through("double", **TREES, trace=tracer(traced, 2.0))()
    monkeypatch.setattr(layers, "gated", lambda *args, **how: layers.linear(*args, **how))
    patched = Executables(jax.devices()[0])
    executable = patched.through("double", **TREES, trace=tracer(traced, -2.0))()
    np.testing.assert_array_equal(doubled(executable), -2.0 * np.arange(1000))
    assert traced == [2.0, -2.0]


def test_a_damaged_file_is_replaced(
    cache: Executables, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    traced: list[float] = []
    get = partial(cache.through, "double", **TREES, trace=tracer(traced, 2.0))
    get()()
    [file] = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    forget(folder)
    np.testing.assert_array_equal(doubled(get()()), 2.0 * np.arange(1000))
    assert "compiling anew" in caplog.text and len(traced) == 2
    get()()
    assert len(traced) == 2, "the file is whole again"


def test_what_jax_had_in_its_own_cache_is_not_written_again(
    cache: Executables, folder: Path
) -> None:
    """An executable of XLA:CPU that was read from a file and written anew has lost functions."""
    traced: list[float] = []
    cache.through("double", **TREES, trace=tracer(traced, 2.0))()
    for file in folder.iterdir():
        file.unlink()
    for _ in range(2):
        executable = cache.through("double", **TREES, trace=tracer(traced, 2.0))()
        np.testing.assert_array_equal(doubled(executable), 2.0 * np.arange(1000))
    assert len(traced) == 3 and not list(folder.iterdir())


def test_what_cannot_be_kept_runs_all_the_same(
    cache: Executables, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    executable = cache.through("double", **TREES, trace=tracer([], 2.0))()
    np.testing.assert_array_equal(doubled(executable), 2.0 * np.arange(1000))
    assert "was not kept" in caplog.text


def test_the_folder_stays_within_its_limit(
    cache: Executables, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.through("first", **TREES, trace=tracer([], 2.0))()
    [first] = folder.iterdir()
    size = first.stat().st_size
    os.utime(first, (0, 0))
    monkeypatch.setattr(executables, "MAX_BYTES", int(2.5 * size))
    for key in ("second", "third"):
        forget(folder)
        cache.through(key, **TREES, trace=tracer([], 2.0))()
    assert len(list(folder.iterdir())) == 2 and not first.exists()


def test_nothing_is_kept_where_jax_keeps_nothing(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        traced: list[float] = []
        for _ in range(2):
            Executables(jax.devices()[0]).through("double", **TREES, trace=tracer(traced, 2.0))()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert len(traced) == 2 and not folder.exists()


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "import jax, jaxengine.building\n"
        "from jaxengine.fingerprint import fingerprint\n"
        "print(fingerprint(jax.devices()[0]))"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=env | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1


def test_a_fingerprint_sees_code_data_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    before = fingerprint(device)
    assert fingerprint(device) == before
    changed = []
    with monkeypatch.context() as patch:
        patch.setattr(layers.Norm, "__doc__", "said otherwise")
        assert fingerprint(device) == before, "words are not code"
    for target, name, value in (
        (layers, "rms_norm", lambda x, scale, *, eps: x * 2),
        (layers.Parameters, "scale", lambda self, **axes: None),
        (step_programs, "CUBLAS_OPTIONS", {"xla_gpu_autotune_level": 1}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            changed.append(fingerprint(device))
    with jax.default_matmul_precision("highest"):
        changed.append(fingerprint(device))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    changed.append(fingerprint(device))
    assert len({before, *changed}) == 6
