"""Lowering for an NVIDIA GPU on a machine without one: shapes, layouts and instructions that a
kernel may not have are refused there, though nothing is run. And many programs compiled at once."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax


def as_on_a_gpu() -> AbstractContextManager:
    """Where what is lowered, or traced with kernels that are lowered apart, is for a GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lower_for_cuda(
    function: Callable[..., Any], *args: Any, donate: Any = (), **kwargs: Any
) -> Any:
    """What `jax.jit(function)` lowers to, of arguments given as arrays or shapes."""
    with as_on_a_gpu():
        traced = jax.jit(function, donate_argnums=donate).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",))


def compile_ahead(
    calls: Mapping[Any, tuple[Callable[..., Any], Sequence[Any]]],
) -> dict[Any, Future]:
    """Programs of functions for their arguments, which may be shapes, compiled side by side: most
    of the time goes by in CUDA's compilers, outside of Python. A failure is raised by `result()`.
    """
    threads = ThreadPoolExecutor(os.cpu_count())
    futures: dict[Any, Future] = {}
    for key, (function, arguments) in calls.items():
        try:
            futures[key] = threads.submit(jax.jit(function).lower(*arguments).compile)
        except Exception as error:
            futures[key] = Future()
            futures[key].set_exception(error)
    threads.shutdown(wait=False)
    return futures
