"""What fails is told to whom it concerns, with its cause, and to nobody else."""

from collections import deque
from typing import Any

import pytest
from engines import NAN_TOKEN, InBackground

from jaxengine import Engine

LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def ids_of(engine: Engine, prompt: Any = (1, 2, 3), params: Any = SHORT) -> Any:
    return engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]


def test_a_step_that_fails_is_told_to_all_who_wait_and_all_who_come(make_engine):
    engine = make_engine()
    cause = RuntimeError("boom")

    def fail(plan: Any, packed: Any) -> Any:
        raise cause

    stream = engine.generate(input_ids=[1], sampling_params=LONG, stream=True)
    next(stream)
    call = InBackground(engine, lambda: engine.generate(input_ids=[[2], [3]], sampling_params=LONG))
    engine._loop.runner.submit = fail
    error = call.join().error
    assert isinstance(error, RuntimeError) and "the engine failed: RuntimeError('boom')" in str(
        error
    )
    assert error.__cause__ is cause
    chunks = []
    with pytest.raises(RuntimeError, match="the engine failed: RuntimeError"):
        for chunk in stream:
            chunks.append(chunk)
    assert chunks[-1]["meta_info"]["finish_reason"]["status_code"] == 500
    with pytest.raises(RuntimeError, match="takes no more requests: RuntimeError") as caught:
        ids_of(engine)
    assert caught.value.__cause__ is cause
    with pytest.raises(RuntimeError, match="boom"):
        engine.flush_cache()
    engine.shutdown()
    assert len(ids_of(make_engine())) == 4


def test_logits_that_are_no_numbers_end_their_own_request_only(make_engine):
    engine = make_engine()
    alone = ids_of(engine, [1, 2, 3], LONG)
    call = InBackground(engine, lambda: ids_of(engine, [1, 2, 3], LONG))
    result = engine.generate(input_ids=[5, NAN_TOKEN], sampling_params=LONG)
    assert result["output_ids"] == []
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "NaN happened"}
    assert call.join().result == alone


def test_pages_that_held_such_numbers_are_clean_for_the_next(make_engine):
    engine = make_engine(max_total_tokens=64)
    alone = ids_of(engine, [1, 2, 3])
    for length in (3, 4, 5, 17, 60):
        poison = engine.generate(
            input_ids=[NAN_TOKEN] * length, sampling_params=LONG | {"max_new_tokens": 2}
        )
        assert poison["meta_info"]["finish_reason"]["matched"] == "NaN happened"
        assert ids_of(engine, [1, 2, 3]) == alone
        again = engine.generate(input_ids=[NAN_TOKEN] * length, sampling_params=SHORT)
        assert again["meta_info"]["cached_tokens"] == 0, "what is no number is not cached"
        assert engine.flush_cache().success


def test_numbers_that_fail_later_keep_the_tokens_before(make_engine):
    engine = make_engine()
    runner = engine._loop.runner
    submit, collect, count = runner.submit, runner.collect, 0
    plans = deque()  # collected in the order in which they were submitted

    def counting(plan: Any, packed: Any) -> Any:
        plans.append(plan)
        return submit(plan, packed)

    def failing(told: Any) -> list[list[int]]:
        nonlocal count
        tokens = collect(told)
        for index, row in enumerate(plans.popleft().rows):
            if row.request.rid == "bad":
                count += 1
                tokens[index] = [-1] if count == 3 else tokens[index]
        return tokens

    def install() -> None:
        runner.submit, runner.collect = counting, failing

    engine._loop.call(install).result()
    good, bad = engine.generate(
        input_ids=[[1, 2], [1, 2]], sampling_params=LONG, rid=["good", "bad"]
    )
    assert bad["output_ids"] == good["output_ids"][:2] and len(good["output_ids"]) == 200
    assert bad["meta_info"]["completion_tokens"] == 2
    assert bad["meta_info"]["finish_reason"] == {"type": "stop", "matched": "NaN happened"}
