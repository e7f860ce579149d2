"""Steps that do more than draw are compiled for whom asks, while the others go on."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import SMALL, check_books

from jaxengine import CustomLogitProcessor, Engine
from jaxengine.variants import Variants

PLAIN = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}


class Unchanged(CustomLogitProcessor):
    def __call__(self, logits: np.ndarray, custom_param_list: Any) -> np.ndarray:
        return logits


WISHES: dict[str, dict[str, Any]] = {
    "log-probabilities": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3},
    "of outputs": {"return_logprob": True, "token_ids_logprob": [5, 6]},
    "states": {"return_hidden_states": {"layers": [1], "positions": "all"}},
    "last state": {"return_hidden_states": "last"},
    "a form": {"sampling_params": PLAIN | {"regex": "[a-z ]{40}"}},
    "a processor": {"custom_logit_processor": Unchanged()},
    "a form and log-probabilities": {
        "sampling_params": PLAIN | {"regex": "[a-z ]{40}"},
        "return_logprob": True,
    },
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(**SMALL) as engine:
        check_books(engine)
        yield engine


@pytest.mark.parametrize("wish", WISHES)
def test_what_a_request_needs_is_compiled_before_it_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    traced: list[str] = []
    trace = Variants._trace

    def noted(self: Variants, key: Any) -> Any:
        traced.append(threading.current_thread().name)
        return trace(self, key)

    monkeypatch.setattr(Variants, "_trace", noted)
    wishes = WISHES[wish]
    prompts = [7], list(range(20, 40)), list(range(20, 220))  # the last one in chunks
    for prompt in prompts * 2:
        num_traced = len(traced)
        for max_new_tokens in (0, 1, 30):
            sampling = wishes.get("sampling_params", PLAIN) | {"max_new_tokens": max_new_tokens}
            engine.generate(input_ids=prompt, **wishes | {"sampling_params": sampling})
    assert traced and len(traced) == num_traced
    assert all(name.startswith("jaxengine-variants") for name in traced)


def test_others_go_on_meanwhile(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_all, begun, may_end = Variants._compile, threading.Event(), threading.Event()

    def slow(self: Variants, keys: Any) -> None:
        begun.set()
        assert may_end.wait(60)
        compile_all(self, keys)

    monkeypatch.setattr(Variants, "_compile", slow)
    monkeypatch.setattr(engine._started.variants, "_compiled", {})

    async def main() -> tuple[Any, Any]:
        asking = asyncio.create_task(
            engine.async_generate(input_ids=[5, 6], sampling_params=PLAIN, **WISHES["last state"])
        )
        assert await asyncio.to_thread(begun.wait, 60)
        plain = await engine.async_generate(input_ids=[5, 6], sampling_params=PLAIN)
        assert not asking.done() and engine._loop.num_live == 0
        may_end.set()
        return plain, await asking

    plain, told = asyncio.run(main())
    assert plain["output_ids"] == told["output_ids"]
    assert "hidden_states" in told["meta_info"]


def test_what_cannot_be_compiled_fails_its_own_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Variants, keys: Any) -> None:
        raise RuntimeError("no memory for this step")

    monkeypatch.setattr(engine._started.variants, "_compiled", {})
    asks = WISHES["last state"]
    with monkeypatch.context() as patch:
        patch.setattr(Variants, "_compile", fail)
        with pytest.raises(RuntimeError, match="no memory for this step"):
            engine.generate(input_ids=[5], sampling_params=PLAIN, **asks)
    told = engine.generate(input_ids=[5], sampling_params=PLAIN, **asks)
    assert "hidden_states" in told["meta_info"]
