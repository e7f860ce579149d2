"""Where compiled programs are kept during a benchmark: how long a start takes depends on little
else."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxengine.bench.options import Options
from jaxengine.config import configure_jax


@contextmanager
def compile_cache(options: Options) -> Iterator[dict[str, Any]]:
    """JAX's compile cache where the options want it, and what is known of it; as before
    afterwards."""
    configure_jax()
    if options.has_fresh_cache:
        with tempfile.TemporaryDirectory(prefix="jaxengine-bench-") as folder:
            with _cached_in(Path(folder)):
                yield {"folder": None, "files_before": 0}
    elif options.cache_dir is not None:
        options.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _cached_in(options.cache_dir / "jax"):
            yield _cache_facts(options.cache_dir)
    else:
        chosen = jax.config.values["jax_compilation_cache_dir"]
        yield _cache_facts(Path(chosen)) if chosen else {"folder": None, "files_before": 0}


@contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    _configure(wanted)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else the folder it was first used with stays


def _cache_facts(folder: Path) -> dict[str, Any]:
    count = sum(path.is_file() for path in folder.rglob("*"))
    return {"folder": str(folder), "files_before": count}
