"""Building executables side by side, and counting what is built later."""

import gc
import threading
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.compiling import Bucket, CompileCounter, compile_all, thinned, waiting


def lowering(size: int):
    return jax.jit(lambda x: x * 2 + size).lower(jax.ShapeDtypeStruct((size,), jnp.float32))


def test_all_are_built_whatever_the_number_of_threads() -> None:
    for num_threads in (1, 4):
        tasks = {size: lambda size=size: lowering(size).compile for size in (1, 2, 3)}
        built = compile_all(tasks, num_threads=num_threads, shows_progress=False)
        for size in tasks:
            np.testing.assert_array_equal(
                built[size](np.ones(size, np.float32)), [2.0 + size] * size
            )


def test_a_single_step_waits_for_several_of_as_many_rows() -> None:
    sizes = Bucket(1, 1, 1), Bucket(1, 1, 8), Bucket(4, 4, 8), Bucket(16, 16, 1), Bucket(32, 16)
    assert waiting(sizes) == {Bucket(1, 1, 1): Bucket(1, 1, 8)}
    assert waiting(sizes[:1]) == {}


@pytest.mark.parametrize("fails", [False, True])
def test_one_is_built_when_another_is(fails: bool) -> None:
    begun, may_end, order = threading.Event(), threading.Event(), []

    def first() -> str:
        begun.set()
        may_end.wait(10)
        order.append("first")
        if fails:
            raise ValueError("cannot be compiled")
        return "one"

    def third() -> str:
        assert begun.wait(10)
        order.append("third")
        may_end.set()
        return "three"

    def second() -> str:
        order.append("second")
        return "two"

    tasks = {"one": lambda: first, "two": lambda: second, "three": lambda: third}
    with pytest.raises(ValueError, match="cannot be compiled") if fails else nullcontext():
        built = compile_all(tasks, num_threads=3, shows_progress=False, after={"two": "one"})
        assert built == {"one": "one", "two": "two", "three": "three"}
    assert order[:2] == ["third", "first"]


def test_a_failure_is_raised() -> None:
    def fail():
        raise ValueError("cannot be lowered")

    with pytest.raises(ValueError, match="cannot be lowered"):
        compile_all({1: lambda: lowering(1).compile, 2: fail}, num_threads=2, shows_progress=False)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_not_looked_for_while_tracing_and_is_again_afterwards(fails: bool) -> None:
    seen = []

    def trace():
        seen.append(gc.isenabled())
        if fails:
            raise ValueError("cannot be lowered")
        return lambda: None

    with pytest.raises(ValueError) if fails else nullcontext():
        compile_all({1: trace}, num_threads=1, shows_progress=False)
    assert seen == [False]
    assert gc.isenabled()


def test_few_sizes_are_left_for_what_is_rarely_asked():
    decode = [Bucket(n, n, 8) for n in (1, 2, 8, 16, 32, 64, 128, 192, 256, 384, 512)]
    extend = [Bucket(n, 256) for n in (256, 1024, 2048, 4096, 8192)]
    left = thinned(sorted(decode + extend))
    assert left == sorted(left)
    assert [size.num_rows for size in left if size.num_steps] == [1, 2, 16, 64, 256, 512]
    assert [size.num_tokens for size in left if not size.num_steps] == [256, 1024, 4096, 8192]
    assert thinned([Bucket(4, 4, 1)]) == [Bucket(4, 4, 1)]


def test_the_counter_sees_its_own_thread_alone() -> None:
    counter = CompileCounter()
    counter.start()
    other = threading.Thread(target=lambda: jax.jit(lambda x: x - 7)(jnp.ones(3)))
    other.start()
    other.join()
    assert counter.count == 0
    jax.jit(lambda x: x - 8)(np.ones(3))
    assert counter.count > 0
    seen = counter.count
    counter.close()
    jax.jit(lambda x: x - 9)(np.ones(3))
    assert counter.count == seen
