"""The methods of an engine that change its weights and its memory while it runs: for training that
generates in between. What they do is told in `weight_updates` and `occupation`."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxengine import models
from jaxengine.loading import read_checkpoint
from jaxengine.occupation import KV_CACHE, WEIGHTS
from jaxengine.weight_updates import Change, changes, named_arrays, tensors_of
from jaxengine.weights import listed

TAGS = (KV_CACHE, WEIGHTS, "cuda_graph")
SELECTORS = ("all", "target")
DISK_FORMATS = (None, "auto", "safetensors")
TENSOR_FORMATS = (None, "direct")


class UpdateResult(NamedTuple):
    success: bool
    message: str


class DiskUpdateResult(NamedTuple):
    success: bool
    message: str
    num_paused_requests: int  # which ran, and are computed anew


def unavailable(instead: str) -> Any:
    """A method that SGLang has and this engine does not: it raises NotImplementedError."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(instead)

    return method


class WeightMethods:
    """Of a class that has `_started`."""

    _started: Any

    def update_weights(
        self, weights: Any, *, weight_version: str | None = None, flush_cache: bool = True
    ) -> UpdateResult:
        """Copies new values into the engine's parameters, between two steps.

        Requests in flight go on with the new weights: what they have generated stays, and is read
        anew, as nothing computed with the old ones is used again. Afterwards the caller's arrays
        may be changed, donated or deleted. Arrays on a device never visit the host.

        Args:
            weights: an nnx model of ours, its state, or a dictionary of arrays (JAX, NumPy,
                PyTorch), by the dotted paths of parameters or by the names of checkpoint tensors.
                What is not given stays as it is. Other floats are cast to the engine's dtype; on
                a device what is too large for float16 becomes infinite.
            weight_version: what `meta_info["weight_version"]` says of requests that finish from now
                on; None: as before.
            flush_cache: False keeps the prefix cache, and K and V of requests in flight, though
                they are of the old weights: faster, and not exact.

        Raises:
            ValueError: a name, shape or dtype that does not fit; then nothing was changed.
            RuntimeError: the weights are released, or the engine has ended.
        """
        return self._update(named_arrays(weights), weight_version, flush_cache)

    def update_weights_from_tensor(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        load_format: str | None = None,
        flush_cache: bool = True,
    ) -> UpdateResult:
        """`update_weights` from pairs of name and tensor; where it cannot be done, success is False
        and the message says why."""
        _check_format(load_format, TENSOR_FORMATS)
        try:
            return self._update(named_tensors, None, flush_cache)
        except ValueError as error:
            return UpdateResult(False, str(error))

    def update_weights_from_disk(
        self, model_path: str, load_format: str | None = None
    ) -> DiskUpdateResult:
        """`update_weights` with all tensors of another checkpoint of the same model, a folder or a
        hub name; where it cannot be done, success is False, the message says why, and the weights
        are those of before. All of it is read, to host memory, before anything is changed."""
        _check_format(load_format, DISK_FORMATS)
        started = self._started
        try:
            tensors = read_checkpoint(started.args, model_path, started.found)
            found = self._changes(tensors.items())
            if missing := started.occupation.tensors.difference(tensors_of(found)):
                raise ValueError(f"{model_path} lacks {listed(missing)}")
        except ValueError as error:
            return DiskUpdateResult(False, str(error), 0)
        num_restarted = started.occupation.update(found, weight_version=None, flush_cache=True)
        return DiskUpdateResult(True, _said(found, num_restarted), num_restarted)

    def begin_weight_update(self, selector: str = "all") -> UpdateResult:
        """Begins an update of several calls. Until `end_weight_update` no step is computed:
        requests are taken and wait, and no token comes from weights of which a part is new.

        Raises:
            ValueError: another selector than "all" or "target"; there is one model only.
            RuntimeError: an update has begun already, or the engine has ended.
        """
        if selector not in SELECTORS:
            raise ValueError(
                f"selector: expected {' or '.join(map(repr, SELECTORS))}, as there is no other "
                f"model, got {selector!r}"
            )
        self._started.occupation.begin()
        return UpdateResult(True, "nothing is computed until end_weight_update()")

    def end_weight_update(self) -> UpdateResult:
        """Ends it: what is computed with the old weights is forgotten, and requests go on.

        Raises:
            RuntimeError: no update has begun, or the engine has ended.
        """
        return UpdateResult(True, _restarted(self._started.occupation.end()))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any] | None:
        """The first `truncate_size` rows of a checkpoint tensor, or of a parameter by its dotted
        path, as lists of floats; None where there is none of that name."""
        occupation = self._started.occupation
        if name not in occupation.parts:
            return None
        return occupation.first_rows(name, truncate_size).tolist()

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Frees device memory; until it is resumed, `generate` raises RuntimeError.

        Args:
            tags: of `kv_cache` (the pool, request state, all prefixes), `weights`, and
                `cuda_graph`, whose memory stays with the compiled programs. None: all.

        Raises: RuntimeError while a request is unfinished.
        """
        self._started.occupation.release(_tags(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Takes released memory again. Weights come back as they were with
        `enable_weights_cpu_backup`; else each has to be updated before the next `generate`."""
        self._started.occupation.resume(_tags(tags))

    init_weights_update_group = destroy_weights_update_group = unavailable(
        "there are no process groups; pass arrays of this process to update_weights()"
    )
    update_weights_from_distributed = update_weights_from_ipc = unavailable(
        "weights come from this process or from files; use update_weights(), or save them and use "
        "update_weights_from_disk()"
    )
    load_lora_adapter = load_lora_adapter_from_tensors = unload_lora_adapter = unavailable(
        "LoRA is not available yet; merge the adapter into the weights and use update_weights()"
    )

    def _update(
        self, named: Iterable[tuple[str, Any]], weight_version: str | None, flush_cache: bool
    ) -> UpdateResult:
        found = self._changes(named)
        num_restarted = self._started.occupation.update(
            found, weight_version=weight_version, flush_cache=flush_cache
        )
        return UpdateResult(True, _said(found, num_restarted))

    def _changes(self, named: Iterable[tuple[str, Any]]) -> list[Change]:
        config = self._started.found.config
        return changes(
            named,
            self._started.occupation.parts,
            is_ignorable=lambda name: models.is_ignorable(name, config),
        )


def _said(found: Sequence[Change], num_restarted: int) -> str:
    return f"{len(found)} arrays were updated, {_restarted(num_restarted)}"


def _restarted(num_restarted: int) -> str:
    return f"{num_restarted} running requests are read anew"


def _check_format(load_format: str | None, expected: Sequence[str | None]) -> None:
    if load_format not in expected:
        raise ValueError(
            f"load_format: expected {' or '.join(map(repr, expected))}, got {load_format!r}"
        )


def _tags(tags: Sequence[str] | None) -> Sequence[str]:
    unknown = [tag for tag in tags or () if tag not in TAGS]
    if unknown or isinstance(tags, str):
        raise ValueError(f"tags: expected a list of {', '.join(TAGS)}, got {tags!r}")
    return tags or TAGS
