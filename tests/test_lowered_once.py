"""A kernel is lowered once for all programs, and each of them makes the call it would have made."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lower_for_cuda
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxengine.pallas_kernels.lowered_once import lowered_once
from jaxengine.pallas_kernels.paged_decode import paged_decode
from jaxengine.pallas_kernels.ragged_extend import ragged_extend

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
F32 = jnp.float32
traced = list[tuple[int, ...]]()  # shapes of `x` for which the kernel below was traced


def in_place(
    factor: int, results: tuple[jax.ShapeDtypeStruct, ...], interpret: bool
) -> Callable[..., Any]:
    """The call (x, y) -> factor x + row, y + 1 in the memory of y; both [B 32]."""

    def kernel(x_ref: Any, y_ref: Any, scaled_ref: Any, y_out_ref: Any) -> None:
        traced.append(x_ref.shape)
        row = pl.program_id(0)
        scaled_ref[row, :] = x_ref[row, :] * float(factor) + row.astype(F32)
        y_out_ref[row, :] = y_ref[row, :] + 1

    return pl.pallas_call(
        kernel,
        grid=(results[0].shape[0],),
        out_shape=results,
        input_output_aliases={1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="in_place",
    )


def both(B: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((B, 32), F32),) * 2


def scaled(x: Any, y: Any, factor: int, **how: Any) -> Any:
    return lowered_once(in_place, factor, results=both(len(x)), **how)(x, y)


@pytest.fixture(autouse=True)
def no_places() -> Iterator[None]:
    """Programs do not tell which line of the source they are from."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    traced.clear()
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


def calls(text: str) -> list[str]:
    """The custom calls of a program, without the names of values."""
    lines = (line for line in text.splitlines() if "custom_call" in line)
    return [re.sub(r"%\w+(#\d+|:\d+)?", "%", line).strip() for line in lines]


def test_the_call_is_that_of_the_kernel_itself() -> None:
    direct = lower_for_cuda(lambda x, y: in_place(3, both(4), False)(x, y), *both(4)).as_text()
    text = lower_for_cuda(lambda x, y: scaled(x, y, 3), *both(4)).as_text()
    assert "operand_index = 1" in text
    assert calls(text) == calls(direct)


def test_programs_share_kernels_of_equal_arguments_and_shapes() -> None:
    texts = [
        lower_for_cuda(lambda x, y, n=n: scaled(x + n, y, 5), *both(4)).as_text() for n in (1, 2)
    ]
    assert traced == [(4, 32)]
    assert calls(texts[0]) == calls(texts[1])
    lower_for_cuda(lambda x, y: scaled(x, y, 6), *both(4))
    lower_for_cuda(lambda x, y: scaled(x, y, 6), *both(8))
    assert traced == [(4, 32), (4, 32), (8, 32)]


def test_a_kernel_that_knows_no_length_is_lowered_once_for_shorter_arrays() -> None:
    how = dict(length=16)
    texts = {
        B: lower_for_cuda(lambda x, y: scaled(x, y, 7, **how), *both(B)).as_text()
        for B in (1, 5, 16, 17)
    }
    assert traced == [(16, 32), (17, 32)]
    for B, text in texts.items():
        assert f"grid_x = {B} : i32" in text
        assert f"tensor<{B}x32xf32>" in text
    assert re.findall(r'ir = "[^"]*"', texts[1]) == re.findall(r'ir = "[^"]*"', texts[5])


def test_an_interpreted_kernel_is_traced_in_its_place() -> None:
    x = np.arange(96, dtype=np.float32).reshape(3, 32)
    out, y = jax.jit(lambda x: scaled(x, x, 2, length=16, interpret=True))(x)
    np.testing.assert_array_equal(out, 2 * x + np.arange(3)[:, None])
    np.testing.assert_array_equal(y, x + 1)


def more_than_a_call(results: Any, interpret: bool) -> Callable[..., Any]:
    return lambda x, y: in_place(1, results, interpret)(x + 1, y)


def test_a_program_of_more_than_a_call_is_refused() -> None:
    def call(x: Any, y: Any) -> Any:
        return lowered_once(more_than_a_call, results=both(4))(x, y)

    with pytest.raises(ValueError, match="more_than_a_call: expected a kernel alone"):
        lower_for_cuda(call, *both(4))


def test_attention_has_the_same_kernels_for_any_number_of_rows_and_tokens() -> None:
    kernels = set()
    for rows, tokens in ((2, 128), (5, 192)):
        bfloat16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        cache, lens = bfloat16(9, 2, 2, 16, 64), jax.ShapeDtypeStruct((rows,), jnp.int32)
        table = jax.ShapeDtypeStruct((rows, 4), jnp.int32)

        def attend(q: Any, all_q: Any, cache: Any, lens: Any, table: Any) -> Any:
            how: Any = dict(kv_lens=lens, page_table=table, scale=0.1, window=None)
            out = ragged_extend(all_q, cache, query_starts=lens, query_lens=lens, **how)
            return paged_decode(q, cache, **how), out

        q, all_q = bfloat16(rows, 4, 64), bfloat16(tokens, 4, 64)
        text = lower_for_cuda(attend, q, all_q, cache, lens, table).as_text()
        kernels |= set(re.findall(r'kernel_hash = "(.*?)", module', text))
    assert len(kernels) == 2
