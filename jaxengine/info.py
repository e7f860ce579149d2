"""What the command `info` shows: versions, devices, the cache folder, and a model's sizes.
No weights are read and nothing is compiled."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxengine
from jaxengine import models
from jaxengine.config import cache_dir
from jaxengine.hub import read_json, resolve_model
from jaxengine.memory import device_bytes
from jaxengine.models.shapes import SHAPES
from jaxengine.server_args import ServerArgs

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "numpy")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

Section = dict[str, Any]


def print_info(args: ServerArgs, *, as_json: bool = False) -> None:
    """Prints section by section, so that an error in one leaves the others; or one JSON object."""
    sections = {
        "versions": versions,
        "devices": devices,
        "cache": cache,
        "model": lambda: model(args),
    }
    if as_json:
        print(json.dumps({title: make() for title, make in sections.items()}, indent=2))
        return
    for title, make in sections.items():
        section = make()
        print(title)
        for name, value in section.items():
            print(f"  {name:<16} {value}", flush=True)


def versions() -> Section:
    found = {"jaxengine": jaxengine.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> Section:
    """Each device that JAX sees; of a CPU's memory, the part an engine would take."""
    return {
        str(device): f"{device.device_kind}, {_in_units(device_bytes(device))}"
        for device in jax.devices()
    }


def cache() -> Section:
    folder = cache_dir()
    if folder is None:
        return {"folder": "none"}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"folder": str(folder), "size": _in_units(size)}


def model(args: ServerArgs) -> Section:
    """Shape and sizes of the model that an engine with these arguments would run.

    Raises: ValueError where there is no such model, or its config is not understood.
    """
    folder, content = _files(args)
    config = models.read_config(content | args.model_overrides)
    parameters = nnx.state(nnx.eval_shape(lambda: models.build(config)))
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    itemsize = jnp.dtype(config.dtype).itemsize
    token_bytes = 2 * config.num_cached_layers * config.num_kv_heads * config.head_size * itemsize
    heads = f"{config.num_heads} query heads, {config.num_kv_heads} kv heads"
    return {
        "folder": str(folder) if folder else "none: a built-in shape",
        "architecture": config.architecture,
        "parameters": f"{count:,} of {config.dtype}, {_in_units(count * itemsize)}",
        "layers": f"{config.num_layers} of width {config.hidden_size}",
        "attention": f"{heads} of size {config.head_size}",
        "vocabulary": f"{config.vocab_size} tokens",
        "context": f"{config.max_position} tokens",
        "kv cache": f"{_in_units(token_bytes)} a token",
        "chat template": "yes" if folder and _has_chat_template(folder) else "no",
    }


def _files(args: ServerArgs) -> tuple[Path | None, dict[str, Any]]:
    name = args.model_path
    if name in SHAPES and not Path(name).exists():
        return None, SHAPES[name]
    folder = resolve_model(name, revision=args.revision, download_dir=args.download_dir)
    return folder, read_json(folder / "config.json")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _in_units(num_bytes: float) -> str:
    for unit in UNITS:
        if num_bytes < 1024 or unit == UNITS[-1]:
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
