"""The tensors of a folder of safetensors, by name, memory-mapped. It does not know their purpose.

Only safetensors are read: the other formats are pickles, and unpickling a file runs the code in it.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxengine.hub import read_json

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """A checkpoint tensor, not yet read."""

    path: Path
    file: Any  # the open file
    name: str  # there
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling


def open_checkpoint(
    folder: Path, files: ExitStack, modules: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors of all shards by name; the files stay open, memory-mapped, as long as `files`.
    The names of those in folders inside, which `modules` are, begin with the folder's."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        inside = open_checkpoint(folder / module, files)
        tensors |= {f"{module}.{name}": tensor for name, tensor in inside.items()}
    for path in _shards(folder):
        try:
            file = files.enter_context(safe_open(path, framework="numpy"))
            for name in file.keys():
                if name in tensors:
                    raise ValueError(f"{name} is both in {tensors[name].path} and in {path}")
                view = file.get_slice(name)
                tensors[name] = Tensor(path, file, name, tuple(view.get_shape()), view.get_dtype())
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return tensors


def read(tensor: Tensor) -> np.ndarray:
    """The values of a tensor whose file is open."""
    try:
        return tensor.file.get_tensor(tensor.name)
    except SafetensorError as error:
        raise _unreadable(tensor.path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    """The error of a damaged file, naming it."""
    return ValueError(
        f"{path} is not a whole safetensors file ({error}); it may be truncated, or a Git "
        "LFS pointer: download it again"
    )


def _shards(folder: Path) -> list[Path]:
    """The files that the index names, else `model.safetensors`, else every safetensors file."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        values = weight_map.values() if isinstance(weight_map, dict) else [None]
        names = {name for name in values if isinstance(name, str) and Path(name).name == name}
        if len(names) < len(set(map(str, values))):
            raise ValueError(f"{index}: expected a weight_map of tensor names to file names")
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = ", ".join(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        raise ValueError(
            f"{folder} holds no *.safetensors file"
            + (f", and {pickles} is refused, since unpickling runs code" if pickles else "")
            + "; convert it with `save_pretrained` of transformers, or use load_format='dummy'"
        )
    return found
