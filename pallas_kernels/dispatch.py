"""Which implementation runs each hot operation, and every reason where a wanted one cannot.
It knows the kernels by name; what they compute is told in their own files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

MODULES = {  # of decode and extend attention: for Hopper, for older GPUs too
    "mosaic": ("paged_decode", "ragged_extend"),
    "triton": ("paged_decode_triton", "ragged_extend_triton"),
}
PREFERRED = ("mosaic", "triton", "xla")
MAX_FEW_ROWS = 2  # more are for tensor cores


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The implementation of each operation. Static: another choice is another program."""

    decode: str = "xla"  # attention of rows of one token
    extend: str = "xla"  # attention of rows of more
    max_chunk_tokens: int = 128  # of a context, which attention by "xla" takes at once
    rotation: str = "xla"  # head norms, rotary embedding and KV write
    fuses_decode: bool = False  # both in one for rows of one token that are of as many sequences
    sampling: str = "xla"
    max_few_rows: int = 0  # products of so many rows at most have a kernel of their own
    hopper_products: bool = False  # and others those for Hopper's tensor cores
    splits_single_rows: bool = False  # of a ragged batch: those of one token are for `decode`
    launches_early: bool = False  # see `pdl.py`
    interpret: bool = False  # run kernels on a CPU, for tests


XLA = Kernels()
"""What runs everywhere, and what every kernel is compared with."""

XLA_ON_GPU = Kernels(max_chunk_tokens=256)
"""The same where each round of a loop is some launches; a CPU's caches hold fewer tokens."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides whether a kernel fits."""

    capability: tuple[int, int] | None  # of an NVIDIA GPU; None: another device
    dtype: str  # of activations and KV cache
    head_size: int
    group_size: int  # query heads of a kv head
    page_size: int


def choose(backend: str | None, problem: Problem, *, mixes_decode: bool = False) -> Kernels:
    """The preferred kernels that fit; those of `backend`, if one is named.

    With `mixes_decode`, ragged batches are expected to hold many rows of one token.

    Raises:
        ValueError: the named backend does not fit; the message has the reason of each kernel.
    """
    plain = XLA if problem.capability is None else XLA_ON_GPU
    if backend is None and problem.dtype == "float32":
        return plain  # who asks for it wants exact sums, not speed
    decode, extend = (_fitting(which, backend, problem) for which in (0, 1))
    if decode == extend == "xla":
        return plain
    return replace(
        plain,
        decode=decode,
        extend=extend,
        rotation="triton",
        fuses_decode=decode == "mosaic" and _can_fuse(problem.head_size),
        sampling="triton",
        max_few_rows=MAX_FEW_ROWS,
        hopper_products=_takes_hopper_products(backend, problem),
        splits_single_rows=mixes_decode,
        launches_early=problem.capability is not None and problem.capability >= (9, 0),
    )


def paged_decode(kernels: Kernels) -> Callable[..., Any] | None:
    """Attention of rows of one token; None: the reference does it."""
    return _attention(0, kernels.decode, kernels.interpret)


def rotate_write_and_decode(kernels: Kernels) -> Callable[..., Any] | None:
    """Rotation, KV write and attention of rows of one token, no two of one sequence; None: one
    after the other."""
    if not kernels.fuses_decode:
        return None
    kernel = _module("paged_decode").rotate_write_and_decode
    return partial(kernel, interpret=kernels.interpret)


def ragged_extend(kernels: Kernels) -> Callable[..., Any] | None:
    """Attention of rows of several tokens; None: the reference does it."""
    return _attention(1, kernels.extend, kernels.interpret)


def fused_product(kernels: Kernels, shape: Any, dtype: Any) -> Callable[..., Any] | None:
    """The kernel for a product of a `few_row_linear_kernel.Shape`, gated if it is one of two
    weights; None: XLA's is to be taken."""
    fits_hopper = (
        kernels.hopper_products
        and _module("small_batch_linear").unsupported(shape=shape, dtype=dtype) is None
    )
    prefers_hopper = fits_hopper and _module("few_row_linear").is_large(shape, dtype)
    if shape.B <= kernels.max_few_rows and not prefers_hopper:
        name, how = "few_row", dict(launches_early=kernels.launches_early)
    elif fits_hopper:
        name, how = "small_batch", {}
    else:
        return None
    kind = "linear" if shape.M == 1 else "gated"
    function = getattr(_module(f"{name}_linear"), f"{name}_{kind}")
    return partial(function, interpret=kernels.interpret, **how)


def many_row_gated(kernels: Kernels, shape: Any, dtype: Any) -> Callable[..., Any] | None:
    """The kernel for a gated product of such a `Shape`, of rows already normed and without biases;
    None: XLA's is to be taken."""
    _, T, F, D = shape
    return _many_row(kernels, "many_row_gated", T=T, F=F, D=D, dtype=dtype)


def log_normalizer(
    kernels: Kernels, T: int, V: int, D: int, dtype: Any
) -> Callable[..., Any] | None:
    """The kernel for what makes `T` rows of `V` logits log-probabilities; None: XLA's logits are to
    be taken."""
    return _many_row(kernels, "log_normalizer", T=T, V=V, D=D, dtype=dtype)


def _many_row(kernels: Kernels, name: str, **arrays: Any) -> Callable[..., Any] | None:
    if not kernels.hopper_products or _module(name).unsupported(**arrays) is not None:
        return None
    return partial(getattr(_module(name), name), interpret=kernels.interpret)


def _fitting(which: int, backend: str | None, problem: Problem) -> str:
    for name in PREFERRED if backend is None else (backend,):
        reason = _unsupported(which, name, problem)
        if reason is None:
            return name
    raise ValueError(
        f"attention_backend: {backend} cannot be used here: {reason}; leave it out for one that can"
    )


def _can_fuse(head_size: int) -> bool:
    return _module("paged_decode").unsupported_fused(head_size) is None


def _takes_hopper_products(backend: str | None, problem: Problem) -> bool:
    is_hopper = problem.capability == (9, 0)
    return is_hopper and backend in (None, "mosaic") and problem.dtype == "bfloat16"


def _unsupported(which: int, backend: str, problem: Problem) -> str | None:
    """Why an attention kernel cannot be used; None where it can."""
    if backend == "xla":
        return None
    if problem.capability is None:
        return "it needs an NVIDIA GPU"
    if backend == "mosaic" and problem.capability != (9, 0):
        return f"it needs a GPU of compute capability 9.0, not {_dotted(problem.capability)}"
    if problem.capability < (8, 0):
        return f"it needs compute capability 8.0 or more, not {_dotted(problem.capability)}"
    return _module(MODULES[backend][which]).unsupported(
        head_size=problem.head_size,
        group_size=problem.group_size,
        page_size=problem.page_size,
        dtype=problem.dtype,
    )


def _attention(which: int, backend: str, interpret: bool) -> Callable[..., Any] | None:
    if backend == "xla":
        return None
    name = MODULES[backend][which]
    return partial(getattr(_module(name), name.removesuffix("_triton")), interpret=interpret)


def _module(name: str) -> ModuleType:
    """Imported when it is needed: Pallas takes time, and many a run needs none of it."""
    return import_module(f"jaxengine.pallas_kernels.{name}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
