"""Safetensors -> parameters on the device, tensor by tensor; or random parameters made there.

Which tensor fills what is the model family's map (`checkpoint_pieces`); how a tensor gets out of
its file is not known here either.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from jaxengine.checkpoint import Tensor, open_checkpoint, read
from jaxengine.models.interface import Piece

DTYPES = ("BF16", "F16", "F32", "F64")
DUMMY_SCALE = 0.02


def load_parameters(
    folder: Path,
    model: nnx.Module,
    pieces: Mapping[str, Sequence[Piece]],
    *,
    base_prefix: str = "",
    modules: Iterable[str] = (),
    is_ignorable: Callable[[str], bool] = lambda name: False,
    progress: bool = True,
) -> nnx.State[Any, Any]:
    """The parameters of an abstract `model`, read from `folder` and cast to the model's dtypes.

    The host holds the parameter being read and the one being sent, never more. `progress` shows a
    bar on stderr. Where no tensor's name begins with `base_prefix`, the pieces' do not either;
    those in folders inside, `modules`, have names that begin with the folder's. Raises ValueError
    naming the tensors that are missing, misshapen or unexpected, except those that `is_ignorable`.
    """
    leaves = nnx.to_flat_state(nnx.state(model))
    wanted = {dotted(path): param for path, param in leaves}
    if wanted.keys() != pieces.keys():
        raise RuntimeError(f"parameters and pieces differ: {sorted(wanted.keys() ^ pieces.keys())}")
    with ExitStack() as files:
        tensors = open_checkpoint(folder, files, modules)
        if not any(name.startswith(base_prefix) for name in tensors):
            pieces = _without_prefix(pieces, base_prefix)
        _check(folder, tensors, wanted, pieces, is_ignorable)
        total = sum(param.size * param.dtype.itemsize for param in wanted.values())
        bar = files.enter_context(_progress_bar(total, progress))
        return nnx.from_flat_state(_place(leaves, pieces, tensors, bar))


def dummy_parameters(model: nnx.Module, seed: int = 0) -> nnx.State[Any, Any]:
    """Random parameters of an abstract `model`, made on the device: noise of 0.02; ones for norms.

    One small program per distinct shape, so that any model takes seconds and the extra memory is
    that of one parameter at most.
    """
    key = jax.random.key(seed)
    made = []
    for index, (path, param) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if str(path[-1]).endswith("norm"):
            value = jnp.ones(param.shape, param.dtype)
        else:
            value = _noise(jax.random.fold_in(key, index), param.shape, param.dtype)
        made.append((path, param.replace(value)))
    return nnx.from_flat_state(made)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(DUMMY_SCALE, dtype)


def _without_prefix(
    pieces: Mapping[str, Sequence[Piece]], prefix: str
) -> dict[str, Sequence[Piece]]:
    return {
        path: [piece._replace(name=piece.name.removeprefix(prefix)) for piece in parts]
        for path, parts in pieces.items()
    }


def _place(
    leaves: Sequence[tuple[tuple, nnx.Variable]],
    pieces: Mapping[str, Sequence[Piece]],
    tensors: Mapping[str, Tensor],
    bar: tqdm,
) -> list[tuple[tuple, nnx.Variable]]:
    placed = []
    sending = None
    for path, param in leaves:
        host = _read(pieces[dotted(path)], tensors, param.shape, np.dtype(param.dtype))
        if sending is not None:
            sending.block_until_ready()  # it holds its host buffer until then
        sending = jax.device_put(host)
        placed.append((path, param.replace(sending)))
        bar.update(host.nbytes)
    return placed


def _read(
    parts: Sequence[Piece], tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """One parameter, filled with its pieces."""
    if len(parts) == 1:
        return _read_tensor(tensors[parts[0].name], parts[0].name, dtype).reshape(shape)
    host = np.empty(shape, dtype)
    for name, index in parts:
        part = host[index]
        part[...] = _read_tensor(tensors[name], name, dtype).reshape(part.shape)
    return host


def _read_tensor(tensor: Tensor, name: str, dtype: np.dtype) -> np.ndarray:
    return cast(read(tensor), dtype, f"{name} in {tensor.path}")


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` as `dtype`; ValueError, naming them, where float16 has no room for one."""
    if dtype == np.float16 and values.dtype != dtype:
        values = values.astype(np.float32)  # from here NumPy notices an overflow
    try:
        with np.errstate(over="raise"):
            return values.astype(dtype, copy=False)
    except FloatingPointError as error:
        raise ValueError(
            f"{name} has values beyond {dtype.name}; load it with dtype='bfloat16'"
        ) from error


def _check(
    folder: Path,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, nnx.Variable],
    pieces: Mapping[str, Sequence[Piece]],
    is_ignorable: Callable[[str], bool],
) -> None:
    """ValueError unless the checkpoint's names, shapes and dtypes are the model's."""
    needed: dict[str, tuple[int, ...]] = {}
    for path, parts in pieces.items():
        shapes = {name: shape_of(wanted[path].shape, index) for name, index in parts}
        if sum(map(math.prod, shapes.values())) != wanted[path].size:
            raise RuntimeError(f"the pieces of {path} do not fill its shape {wanted[path].shape}")
        needed |= shapes
    wrong = {
        "missing": needed.keys() - tensors.keys(),
        "unexpected": {n for n in tensors.keys() - needed.keys() if not is_ignorable(n)},
        "misshapen": set(_misshapen(tensors, needed)),
        "not floating point (quantised checkpoints are not supported)": {
            f"{name} ({tensors[name].dtype})"
            for name in needed.keys() & tensors.keys()
            if tensors[name].dtype not in DTYPES
        },
    }
    problems = [f"{what}: {listed(names)}" for what, names in wrong.items() if names]
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json. " + ". ".join(problems)
        )


def _misshapen(
    tensors: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]]
) -> Iterable[str]:
    for name in needed.keys() & tensors.keys():
        path, shape = tensors[name].path, tensors[name].shape
        if not merges_to(needed[name], shape):
            yield f"{name} in {path.name} is {shape}, expected {needed[name]} (neighbours merged)"


def merges_to(shape: tuple[int, ...], merged: tuple[int, ...]) -> bool:
    """Whether multiplying neighbouring dimensions of `shape` gives `merged`."""
    rest = list(shape)
    for size in merged:
        product = rest.pop(0) if rest else 1
        while product < size and rest:
            product *= rest.pop(0)
        if product != size:
            return False
    return math.prod(rest) == 1


def shape_of(shape: tuple[int, ...], index: Any) -> tuple[int, ...]:
    """The shape of `parameter[index]`."""
    return np.broadcast_to(np.int8(0), shape)[index].shape


def dotted(path: Sequence[Any]) -> str:
    """The name of a parameter, from its path in the model."""
    return ".".join(map(str, path))


def listed(names: Iterable[str], limit: int = 10) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _progress_bar(total: int, progress: bool) -> tqdm:
    return tqdm(
        total=total,
        desc="weights",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    )
