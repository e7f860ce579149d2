"""Which kernels are chosen where, and what is said of those that cannot be."""

from dataclasses import replace
from typing import Any

import pytest

from jaxengine.pallas_kernels.dispatch import (
    MODULES,
    XLA,
    XLA_ON_GPU,
    Problem,
    choose,
    fused_product,
    paged_decode,
    ragged_extend,
)
from jaxengine.pallas_kernels.few_row_linear_kernel import Shape

HOPPER = Problem(capability=(9, 0), dtype="bfloat16", head_size=128, group_size=4, page_size=64)


def attention(backend: str | None, problem: Problem) -> tuple[str, str]:
    kernels = choose(backend, problem)
    return kernels.decode, kernels.extend


def test_each_gpu_gets_kernels_that_it_can_run():
    assert attention(None, HOPPER) == ("mosaic", "mosaic")
    assert attention(None, replace(HOPPER, head_size=80)) == ("triton", "triton")
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert attention(None, replace(HOPPER, capability=capability)) == ("triton", "triton")
    assert choose(None, replace(HOPPER, capability=None)) == XLA
    for problem in (
        replace(HOPPER, capability=(7, 5)),
        replace(HOPPER, dtype="float32"),
        replace(HOPPER, head_size=72),
    ):
        assert choose(None, problem) == XLA_ON_GPU


def test_what_a_gpu_and_its_batches_are_like_is_known():
    assert choose(None, HOPPER).launches_early and not choose(None, HOPPER).splits_single_rows
    assert choose(None, HOPPER, mixes_decode=True).splits_single_rows
    assert not choose(None, replace(HOPPER, capability=(8, 9))).launches_early
    # Products know nothing of heads.
    assert all(choose(None, replace(HOPPER, head_size=size)).hopper_products for size in (128, 80))
    for problem in (replace(HOPPER, capability=(8, 9)), replace(HOPPER, dtype="float16")):
        assert not choose(None, problem).hopper_products
    assert not choose("triton", HOPPER).hopper_products


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (Shape(1, 1, 4096, 1024), "few_row_linear"),
        (Shape(2, 2, 3072, 1024), "few_row_gated"),
        (Shape(1, 1, 4096, 14336), "small_batch_linear"),
        (Shape(2, 2, 14336, 4096), "small_batch_gated"),
        (Shape(1, 1, 4100, 14336), "few_row_linear"),  # no tiles
        (Shape(1, 8, 4096, 1024), "small_batch_linear"),
        (Shape(1, 4, 4096, 1024), None),
        (Shape(1, 128, 4096, 1024), None),
    ],
)
def test_a_product_is_for_the_kernel_that_suits_rows_and_weight(shape, name):
    product: Any = fused_product(choose(None, HOPPER), shape, "bfloat16")
    assert (product and product.func.__name__) == name
    older = fused_product(choose(None, replace(HOPPER, capability=(8, 0))), shape, "bfloat16")
    assert (older is None) == (shape.B > 2)


@pytest.mark.parametrize("backend", MODULES)
def test_a_named_backend_is_taken_for_both(backend):
    kernels = choose(backend, HOPPER)
    assert (kernels.decode, kernels.extend) == (backend, backend)
    assert choose("xla", HOPPER) == XLA_ON_GPU
    assert paged_decode(kernels) is not None and ragged_extend(kernels) is not None
    assert paged_decode(XLA) is None and ragged_extend(XLA) is None


@pytest.mark.parametrize(
    ("backend", "changed", "reason"),
    [
        ("mosaic", dict(capability=None), "NVIDIA GPU"),
        ("mosaic", dict(capability=(8, 9)), "9.0, not 8.9"),
        ("triton", dict(capability=(7, 5)), "8.0 or more, not 7.5"),
        ("mosaic", dict(head_size=80), "head size .* not 80"),
        ("mosaic", dict(dtype="float32"), "not float32"),
        ("triton", dict(group_size=17), "not 17"),
        ("triton", dict(page_size=8), "not 8"),
    ],
)
def test_one_that_cannot_run_is_refused_with_the_reason(backend, changed, reason):
    with pytest.raises(ValueError, match=f"attention_backend: {backend} .*{reason}.*leave it out"):
        choose(backend, replace(HOPPER, **changed))
