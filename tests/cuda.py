"""Lowering for an NVIDIA GPU on a machine without one: shapes, layouts and instructions that a
kernel may not have are refused there, though nothing is run."""

from collections.abc import Callable
from typing import Any

import jax


def lower_for_cuda(
    function: Callable[..., Any], *args: Any, donate: Any = (), **kwargs: Any
) -> Any:
    """What `jax.jit(function)` lowers to, of arguments given as arrays or shapes."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(function, donate_argnums=donate).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",))
