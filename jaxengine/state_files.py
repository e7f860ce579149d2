"""Hidden states of many prompts in safetensors files, written while the engine goes on: only what a
file is being filled with is in memory."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxengine.hidden_states import HiddenStates

SHARD_BYTES = 1 << 30


def save_hidden_states(
    folder: str | Path, results: Iterable[Mapping[str, Any]], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes the hidden states of results into `states-00000.safetensors` and so on in a folder.

    The tensors of prompt 17 are `17.final_norm`, `17.mlp_output.3` and so on, float32
    `[positions, D]`, with `17.positions`, and `17.last` where only the last was asked for.

    Args:
        results: what `generate` gives, with `return_hidden_states`; of a long list best its stream,
            `generate(prompts, ..., stream=True)`, so that results are written as they end.
        shard_bytes: a file is written once it holds so many.

    Returns:
        The files, in order.

    Raises:
        ValueError: the folder holds such files already, or a result has no hidden states.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("states-*.safetensors")):
        raise ValueError(f"{folder}: holds hidden states already; remove them or choose another")
    files: list[Path] = []
    for tensors in _shards(results, shard_bytes):
        files.append(folder / f"states-{len(files):05}.safetensors")
        save_file(tensors, files[-1])
    return files


def _shards(
    results: Iterable[Mapping[str, Any]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file."""
    tensors: dict[str, np.ndarray] = {}
    num_bytes = 0
    for number, result in enumerate(results):
        info = result["meta_info"]
        if info["finish_reason"] is None:  # a chunk of a stream
            continue
        index = result.get("index", number)
        if "hidden_states" not in info:
            raise ValueError(f"result {index} has no hidden states; pass return_hidden_states")
        new = _tensors(index, info["hidden_states"])
        tensors |= new
        num_bytes += sum(each.nbytes for each in new.values())
        if num_bytes >= shard_bytes:
            yield tensors
            tensors, num_bytes = {}, 0
    if tensors:
        yield tensors


def _tensors(index: int, states: HiddenStates | np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(states, np.ndarray):
        return {f"{index}.last": np.ascontiguousarray(states)}
    found = {f"{index}.positions": states.positions}
    for place in states.places:
        point, layer = place
        name = point if layer is None else f"{point}.{layer}"
        found[f"{index}.{name}"] = np.ascontiguousarray(states.array(place))
    return found
