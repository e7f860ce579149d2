"""Device memory of a running engine, given back and taken again."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from engines import TINY, check_books

from jaxengine import Engine
from jaxengine.memory import num_bytes

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def answer(engine: Engine) -> tuple[list[int], int]:
    result = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    return result["output_ids"], result["meta_info"]["cached_tokens"]


def bytes_alive() -> int:
    gc.collect()  # what other tests left behind goes when it likes
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(model_path=str(tiny_checkpoint), **TINY) as engine:
        check_books(engine)
        yield engine
        assert engine._loop.error is None


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """With all its memory and an empty cache, before and after."""
    yield shared
    shared.resume_memory_occupation()
    assert shared.flush_cache().success
    assert shared.get_server_info()["num_compilations_since_start"] == 0


def test_a_new_kv_cache_is_empty_and_as_good(engine):
    ids, _ = answer(engine)
    assert answer(engine) == (ids, 8)
    engine.release_memory_occupation(["kv_cache"])
    with pytest.raises(RuntimeError, match="^kv_cache were released; call resume_memory_occ"):
        answer(engine)
    with pytest.raises(RuntimeError, match="released"):
        engine.generate(input_ids=PROMPT, sampling_params=GREEDY, stream=True)
    with pytest.raises(RuntimeError, match="released"):
        asyncio.run(engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY))
    engine.resume_memory_occupation(["kv_cache"])
    assert answer(engine) == (ids, 0)
    assert answer(engine) == (ids, 8)


def test_memory_is_given_back_and_taken_again(make_engine):
    engine = make_engine()
    runner = engine._loop.runner
    weights = num_bytes(runner.params)
    buffers = num_bytes((runner._cache, runner._state))
    before = bytes_alive()
    engine.release_memory_occupation(["cuda_graph"])
    assert bytes_alive() == before and answer(engine)
    engine.release_memory_occupation(["kv_cache"])
    assert bytes_alive() == before - buffers
    engine.release_memory_occupation()
    engine.release_memory_occupation(["weights"])
    assert bytes_alive() == before - buffers - weights
    engine.resume_memory_occupation(["weights"])
    assert bytes_alive() == before - buffers
    engine.resume_memory_occupation()
    assert bytes_alive() == before
    engine.shutdown()
    assert bytes_alive() <= before - buffers - weights


def test_weights_are_undefined_until_each_was_updated(engine, tiny_checkpoint):
    ids, _ = answer(engine)
    engine.release_memory_occupation()
    with pytest.raises(RuntimeError, match="^kv_cache and weights were released"):
        answer(engine)
    for use in (
        lambda: engine.update_weights({"norm": np.ones(64, np.float32)}),
        lambda: engine.get_weights_by_name("norm"),
    ):
        with pytest.raises(RuntimeError, match="weights are released; call resume_memory_occ"):
            use()
    engine.resume_memory_occupation(["weights"])
    engine.resume_memory_occupation(["kv_cache"])
    with pytest.raises(RuntimeError, match=r"^25 tensors .* such as lm_head\.weight, have no val"):
        answer(engine)
    engine.update_weights({"lm_head": np.ones((320, 64), np.float32)})
    with pytest.raises(RuntimeError, match="^24 tensors .* such as model.embed_tokens.weight"):
        answer(engine)
    assert engine.update_weights_from_disk(str(tiny_checkpoint)).success
    assert answer(engine) == (ids, 0)


def test_a_backup_brings_the_weights_back(make_engine, tiny_checkpoint):
    engine = make_engine(enable_weights_cpu_backup=True)
    ids, _ = answer(engine)
    for _ in range(2):
        engine.release_memory_occupation(["weights"])
        with pytest.raises(RuntimeError, match="^weights were released"):
            answer(engine)
        engine.resume_memory_occupation()
        assert answer(engine) == (ids, 8), "the prefixes are of the same weights"
    engine.update_weights({"lm_head": np.ones((320, 64), np.float32)})
    assert answer(engine)[0] != ids
    engine.update_weights_from_disk(str(tiny_checkpoint))
    assert answer(engine) == (ids, 0)


def test_nothing_is_released_under_a_request(engine):
    long = GREEDY | {"max_new_tokens": 200}
    stream = engine.generate(input_ids=PROMPT, sampling_params=long, stream=True)
    next(stream)
    with pytest.raises(RuntimeError, match="1 requests are unfinished; wait for them, or abort"):
        engine.release_memory_occupation()
    *_, last = stream
    assert len(last["output_ids"]) == 200
    engine.release_memory_occupation(["kv_cache"])


@pytest.mark.parametrize("tags", [["kv"], "weights", ["weights", "x"]])
def test_unknown_tags_are_refused(engine, tags):
    for use in (engine.release_memory_occupation, engine.resume_memory_occupation):
        with pytest.raises(ValueError, match="^tags: expected a list of kv_cache, weights, cuda"):
            use(tags)
    assert answer(engine)[0]
