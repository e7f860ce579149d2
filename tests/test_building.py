"""Programs and weights side by side, and a pool that leaves room for what the steps really take."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from jaxengine import building
from jaxengine.memory import GIB, Demand
from jaxengine.models.config import ModelConfig
from jaxengine.models.shapes import SHAPES
from jaxengine.server_args import ServerArgs
from jaxengine.sizing import choose_sizes

PAGE = 16 << 20


class Executable:
    def __init__(self, temporaries: int):
        self._temporaries = temporaries

    def memory_analysis(self) -> Any:
        return SimpleNamespace(
            temp_size_in_bytes=self._temporaries,
            generated_code_size_in_bytes=0,
            output_size_in_bytes=0,
            alias_size_in_bytes=0,
        )


@dataclass
class Programs:
    """Of a GPU of 100 GiB, whose steps take so much."""

    temporaries: int
    page_bytes: int = PAGE
    device: Any = field(
        default_factory=lambda: SimpleNamespace(
            memory_stats=lambda: {"bytes_limit": 100 * GIB}, platform="gpu"
        )
    )
    pages: list[int] = field(default_factory=list)

    def trace_step(self, bucket: Any, num_pages: int) -> Any:
        self.pages.append(num_pages)
        return lambda: Executable(self.temporaries)

    def trace_install(self, _: Any) -> Any:
        return lambda: Executable(0)


def sizes_of(args: ServerArgs) -> Any:
    return choose_sizes(args, max_position=65536, device_bytes=100 * GIB, is_cpu=False)


def compiled(programs: Any, reading: Future | None = None, **arguments: Any) -> int:
    args = ServerArgs(show_progress=False, **arguments)
    if reading is None:
        (reading := Future()).set_result(None)
    demand = Demand(others=0, weights=10 * GIB, state=0, steps=GIB)
    num_pages, _ = building._compile(args, programs, sizes_of(args), demand, reading)
    return num_pages


def test_steps_that_take_what_was_foreseen_are_built_once() -> None:
    programs = Programs(GIB // 2)
    num_pages = compiled(programs)
    assert 85 * GIB < num_pages * PAGE < 89 * GIB
    assert len(programs.pages) == len(sizes_of(ServerArgs()).buckets)


def test_steps_that_take_more_are_built_again_for_a_smaller_pool() -> None:
    programs = Programs(20 * GIB)
    num_pages = compiled(programs)
    assert 66 * GIB < num_pages * PAGE < 70 * GIB
    assert len(set(programs.pages)) == 2 and programs.pages[-1] == num_pages


def test_a_pool_of_a_given_size_or_of_no_more_use_stays_as_it_is() -> None:
    assert compiled(Programs(20 * GIB), max_total_tokens=6400) == 100
    useful = compiled(Programs(20 * GIB), context_length=128, max_running_requests=16)
    assert useful == 2 * 16 * 128 // 64


def test_weights_that_cannot_be_read_end_the_start_at_once() -> None:
    @dataclass
    class Slow(Programs):
        def trace_step(self, bucket: Any, num_pages: int) -> Any:
            time.sleep(0.05)
            return super().trace_step(bucket, num_pages)

    def read() -> None:
        raise ValueError("no such tensor")

    programs = Slow(GIB)
    with ThreadPoolExecutor(1) as reader, pytest.raises(ValueError, match="no such tensor"):
        compiled(programs, reader.submit(read))
    assert len(programs.pages) <= 1


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.1-8b"])
def test_what_a_step_takes_is_foreseen_generously_but_not_by_far(shape: str) -> None:
    """Measured on compiled steps of 8192 tokens for an H100: 336 and 908 MB."""
    config = ModelConfig.from_dict(SHAPES[shape])
    measured = {"qwen3-0.6b": 354e6, "llama-3.1-8b": 908e6}[shape]
    sizes = sizes_of(ServerArgs(max_running_requests=256, context_length=8192))
    foreseen = building._foreseen_step_bytes(config, sizes, "bfloat16")
    assert measured < foreseen < 1.5 * measured


def test_programs_are_the_same_whether_a_tokenizer_adds_an_end_or_not() -> None:
    assert building.num_stop_ids(()) == building.num_stop_ids({7}) == building.num_stop_ids({7, 8})
    many = range(100)
    assert building.num_stop_ids(many) == building.num_stop_ids(()) - building.EOS_ROOM + len(many)
