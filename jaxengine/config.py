"""The one place that reads the environment: the cache folder, and what JAX is told before it
starts. It does not know what is cached, nor anything about models."""

import os
import stat
import warnings
from pathlib import Path

MEMORY_FRACTION = 0.92
"""Share of a GPU that JAX's allocator may take. CUDA's context, its graphs and the workspaces of
libraries live in the rest."""


def cache_dir() -> Path | None:
    """The user's cache folder, private to them, or None (with a warning) where none can be trusted.

    `JAXENGINE_CACHE_DIR`, else `jaxengine` under `XDG_CACHE_HOME` or `~/.cache`. Compiled programs
    are loaded from it, so a folder that others can write to would let them run code as the user.
    """
    folder = _chosen_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _distrust(folder)
    except OSError as error:
        reason = f"it cannot be used ({error.strerror})"
    if reason is None:
        return folder
    warnings.warn(
        f"cache folder {folder}: {reason}; nothing is cached and every start compiles anew. "
        "Set JAXENGINE_CACHE_DIR to a folder that only you can write to.",
        stacklevel=2,
    )
    return None


def configure_jax(memory_fraction: float = MEMORY_FRACTION) -> None:
    """Set up JAX's compile cache and its share of GPU memory; what the user has set stays.

    To be called before JAX's first computation: once a backend is up, the memory fraction has no
    effect any more.
    """
    import jax

    # JAX refuses to start when both spellings are set; the second is deprecated but still in use.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{memory_fraction:.3f}"
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_dir()
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
        # The small programs of a step are many; together they cost as much as the large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def executables_dir() -> Path | None:
    """Where executables are kept: beside JAX's compile cache, and nowhere if that is off."""
    import jax

    values = jax.config.values
    folder = values["jax_compilation_cache_dir"]
    if folder is None or not values["jax_enable_compilation_cache"] or "://" in folder:
        return None
    return Path(folder) / "executables"


def xla_settings() -> dict[str, str]:
    """What the environment tells XLA and the compilers under it, apart from JAX's own settings."""
    prefixes = ("XLA_FLAGS", "MOSAIC_", "TRITON_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def _chosen_folder() -> Path:
    chosen = os.environ.get("JAXENGINE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "jaxengine"


def _distrust(folder: Path) -> str | None:
    """Why compiled programs must not be loaded from `folder`, or None."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}, not to you ({os.getuid()})"
    if status.st_mode & stat.S_IWOTH:
        return "everybody can write to it"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "you cannot write to it"
    return None
