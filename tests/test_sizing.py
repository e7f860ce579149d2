"""The sizes an engine starts with."""

from typing import Any

import pytest

from jaxengine.compiling import Bucket, buckets, rungs
from jaxengine.memory import GIB
from jaxengine.models.embedder import EmbedderConfig
from jaxengine.pooling import Embeddings
from jaxengine.server_args import ServerArgs
from jaxengine.sizing import Sizes, choose_sizes


def sizes(
    *,
    memory: float = 141,
    is_cpu: bool = False,
    embeddings: Embeddings | None = None,
    **arguments: Any,
) -> Sizes:
    return choose_sizes(
        ServerArgs(**arguments),
        max_position=4096,
        device_bytes=int(memory * GIB),
        is_cpu=is_cpu,
        embeddings=embeddings,
    )


@pytest.mark.parametrize(
    ("memory", "chunk", "rows"), [(141, 8192, 512), (48, 4096, 64), (24, 2048, 32), (8, 2048, 16)]
)
def test_a_larger_gpu_runs_more_at_a_time(memory: float, chunk: int, rows: int) -> None:
    chosen = sizes(memory=memory)
    assert (chosen.chunk_size, chosen.max_running_requests) == (chunk, rows)


def test_every_plan_that_a_scheduler_may_make_has_a_step() -> None:
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"cuda_graph_max_bs": 4},
        {"cuda_graph_bs": [3, 500]},
        {"chunked_prefill_size": 40, "max_running_requests": 100},
        {"chunked_prefill_size": -1, "max_running_requests": 5},
    )
    for arguments in cases:
        for is_cpu in (False, True):
            chosen = sizes(is_cpu=is_cpu, **arguments)
            rows = chosen.max_running_requests
            assert chosen.chunk_size >= rows
            extend = [bucket for bucket in chosen.buckets if not bucket.num_steps]
            tokens = chosen.chunk_size if is_cpu else -(-chosen.chunk_size // 64) * 64
            assert max(extend) == Bucket(tokens, rows)
            assert all(bucket.num_rows <= bucket.num_tokens for bucket in chosen.buckets)
            assert list(chosen.buckets) == sorted(set(chosen.buckets))


def test_without_chunks_a_step_holds_the_longest_prompt() -> None:
    chosen = sizes(chunked_prefill_size=-1, context_length=4096, max_prefill_tokens=100)
    assert not chosen.can_chunk
    assert chosen.chunk_size == 4096


def test_a_context_beyond_the_models_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="context_length: 5000 is beyond the 4096 positions"):
        assert sizes(context_length=5000).context_length == 5000


def test_the_rungs_of_a_ladder_end_at_the_top() -> None:
    assert rungs((1, 4, 16), 9) == (1, 4, 9)
    assert rungs((1, 4, 16), 16) == (1, 4, 16)
    assert rungs((32, 512), 6) == (6,)


def test_sizes_on_a_gpu_pad_little() -> None:
    chosen = [bucket.num_rows for bucket in sizes().buckets if bucket.num_steps > 1]
    assert chosen[0] == 1 and chosen[-1] == 512
    # The time of up to 8 rows is that of reading the weights, however many they are.
    assert all(b <= max(8, 2 * a) for a, b in zip(chosen, chosen[1:], strict=False))


def test_a_gpu_decodes_several_steps_in_one_launch_unless_told_otherwise() -> None:
    cases: tuple[tuple[dict[str, Any], int], ...] = (
        ({}, 8),
        ({"page_size": 4}, 4),
        ({"num_continuous_decode_steps": 1}, 1),
        ({"is_cpu": True}, 1),
    )
    for arguments, expected in cases:
        chosen = sizes(**arguments)
        assert chosen.decode_steps == expected
        decoding = {bucket.num_steps for bucket in chosen.buckets if bucket.num_steps}
        assert decoding == {1, expected}
        for steps in decoding:
            rows = [bucket.num_rows for bucket in chosen.buckets if bucket.num_steps == steps]
            assert max(rows) == chosen.max_decode_rows


def test_buckets_have_no_more_rows_than_tokens() -> None:
    assert buckets({1: [1, 4], 2: [4]}, [16, 64], 32) == (
        Bucket(1, 1, 1),
        Bucket(4, 4, 1),
        Bucket(4, 4, 2),
        Bucket(16, 16),
        Bucket(64, 32),
    )


def test_an_engine_that_embeds_never_decodes_and_runs_many_at_a_time() -> None:
    chosen = sizes(embeddings=embeddings(reads_whole=False))
    assert not any(bucket.num_steps for bucket in chosen.buckets)
    assert (chosen.chunk_size, chosen.max_running_requests, chosen.can_chunk) == (8192, 1024, True)
    assert (
        sizes(embeddings=embeddings(reads_whole=False), max_running_requests=3).chunk_size == 8192
    )


@pytest.mark.parametrize(("asked", "chunk"), [(None, 8192), (64, 4096), (6000, 6000), (-1, 16384)])
def test_a_step_has_room_for_a_sequence_that_is_read_whole(asked: int | None, chunk: int) -> None:
    chosen = sizes(embeddings=embeddings(reads_whole=True), chunked_prefill_size=asked)
    assert (chosen.chunk_size, chosen.can_chunk) == (chunk, False)
    assert max(bucket.num_tokens for bucket in chosen.buckets) >= chunk


def embeddings(reads_whole: bool) -> Embeddings:
    return Embeddings(
        embedder=EmbedderConfig(pooling="mean", normalizes=True),
        size=64,
        dimensions=(),
        max_length=None,
        reads_whole=reads_whole,
        num_token_types=1,
    )
