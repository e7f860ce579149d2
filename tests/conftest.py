"""What every test runs under: the CPU unless asked otherwise, strict JAX, array annotations that
are executed, and a compile cache that outlives the run."""

import importlib.metadata
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ON_GPU = os.environ.get("JAXENGINE_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Programs run a few times only, so the compilers' time counts; with XLA_FLAGS given, even if
    # empty, they compile as asked.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jax").startswith("0.10."):  # later ones have but one emitter
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", quick)
else:  # trying out products on the device, one after the other, would take most of the time
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {given}"
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored behind a `&`
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its warning about forks would be an error here

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402

pytest_plugins = ["engines"]

HAS_BEARTYPE = importlib.util.find_spec("beartype") is not None
HAS_TORCH = importlib.util.find_spec("torch") is not None


def _modules_with_arrays() -> list[str]:
    """Plain data is left out: it checks its own types, and tests read the messages."""
    root = Path(__file__).parents[1]
    files = [*root.glob("jaxengine/**/*.py"), *root.glob("models/*.py")]
    files += root.glob("pallas_kernels/*.py")
    annotated = [file for file in files if "jaxtyping" in file.read_text(encoding="utf-8")]
    dotted = [".".join(file.relative_to(root).with_suffix("").parts) for file in annotated]
    return [name if name.startswith("jaxengine.") else "jaxengine." + name for name in dotted]


if HAS_BEARTYPE:  # before anything of jaxengine is imported
    # The tower: an int will do where a float is annotated, as in every type checker.
    jaxtyping.install_import_hook(
        _modules_with_arrays(),
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


def _compile_cache() -> str:
    """A folder of the user's own, so that a second run compiles nothing twice."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "jaxengine-tests"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder)


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", _compile_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The first example of a property may compile; a deadline would fail it on a cold cache only.
hypothesis.settings.register_profile("jaxengine", deadline=None)
hypothesis.settings.load_profile("jaxengine")


def pytest_report_header() -> str:
    shapes = "checked" if HAS_BEARTYPE else "not checked: beartype is not installed"
    return f"jax {jax.__version__} on {jax.default_backend()}; array annotations {shapes}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: `make test-gpu` on such a machine")
    needs_torch = pytest.mark.skip(reason="needs PyTorch, the oracle: see `make help`")
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(needs_gpu)
        if item.get_closest_marker("oracle") and not HAS_TORCH:
            item.add_marker(needs_torch)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def few_programs_at_a_time() -> Iterator[None]:
    """JAX keeps what tests compiled, and each program for a CPU takes some of the memory maps that
    a process may have, 65530 by default: beyond them it aborts where it loads one."""
    yield
    jax.clear_caches()
