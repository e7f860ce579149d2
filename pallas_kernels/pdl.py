"""Programmatic dependent launch, for Pallas Triton kernels on GPUs of compute capability 9.0 or
more: the next kernel's programs are put on the chip while this one still runs, which saves about
a microsecond a kernel.

XLA launches its kernels so that they may begin early, and has each wait, first of all, until those
before it have ended and all they wrote is there. What is missing is the word that others may begin;
without it they begin at the end. Where XLA does not launch kernels so, saying it does nothing.

Source: the CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int32


def launch_dependents(value: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """`value`, which the kernel must use; once all its programs have come here, the next kernel's
    may be put on the chip.

    The compiler knows nothing of the result: addresses and masks that it goes into lose what
    makes loads wide, unless it is multiplied by a power of two.
    """
    [same] = pltriton.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[value],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, jnp.int32)],
    )
    return same
