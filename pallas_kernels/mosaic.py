"""What Mosaic kernels share where versions of JAX differ."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def interpreter() -> Any:
    """What runs a kernel on a CPU: public since JAX 0.11."""
    if (public := getattr(plgpu, "InterpretGPUParams", None)) is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
