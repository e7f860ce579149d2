"""The pause of a step: what the host lets each row draw, whatever became of it meanwhile."""

from array import array
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import SMALL, check_books

import jaxengine
from jaxengine import grammar
from jaxengine.logprobs import Wanted
from jaxengine.pausing import Pause
from jaxengine.request import Request, Status
from jaxengine.sampling.masks import everything
from jaxengine.sampling_params import SamplingParams
from jaxengine.step_plan import Row, StepPlan

V = 70
ENDED = {"type": "abort"}


class OddTokens:
    """Stands for a matcher: it allows the odd tokens, or fails."""

    def __init__(self, error: str | None = None):
        self.error: str | None = None
        self._error = error

    def fill(self, words: np.ndarray) -> None:
        words[:] = np.int32(-1431655766)  # each second bit
        self.error = self._error


class Host:
    """A runner that only notes what may be drawn; masks are filled when they are waited for."""

    def __init__(self, num_rows: int):
        self.paused = SimpleNamespace(told="nothing drawn")
        self.buffer = everything(num_rows, V)
        self.drawn: np.ndarray | None = None
        self.failed: list[tuple[Request, str]] = []

    def masks(self, paused: Any) -> np.ndarray:
        return self.buffer

    def draw(self, paused: Any, masks: np.ndarray) -> str:
        self.drawn = masks.copy()
        return "drawn"

    def adjust(self, paused: Any, masks: np.ndarray) -> np.ndarray:
        self.drawn = masks.copy()
        return np.zeros((len(masks), V), np.float32)

    def choose(self, paused: Any, logits: np.ndarray) -> np.ndarray:
        return logits

    def begin_masks(self, matchers: Any, out: np.ndarray) -> Future[None]:
        def fill() -> None:
            for matcher, words in zip(matchers, out, strict=True):
                words.fill(-1)
                if matcher is not None:
                    matcher.fill(words)

        filled: Any = SimpleNamespace(result=fill)
        return filled

    def pause(self, *requests: Request, wanted: Wanted | None = None, num_draws: int = 1) -> Pause:
        rows = tuple(
            Row(request, slot, 2, 1, 0, num_draws) for slot, request in enumerate(requests)
        )
        plan = StepPlan(rows, (), (), len(rows), 1, wanted, pauses=True)
        fail = lambda request, message: self.failed.append((request, message))
        return Pause(self, plan, self.paused, self.begin_masks, fail)


def request(matcher: Any = None, processor: Any = None) -> Request:
    return Request(
        rid="request",
        prompt_ids=array("I", [5, 6, 7]),
        sampling=SamplingParams(),
        max_new_tokens=8,
        stop_token_ids=frozenset(),
        seed=0,
        matcher=matcher,
        processor=processor,
        status=Status.RUNNING,
    )


def allowed(words: np.ndarray) -> list[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:V]
    return np.flatnonzero(bits).tolist()


ALL, ODD = list(range(V)), list(range(1, V, 2))


def test_each_row_may_draw_what_its_own_grammar_allows() -> None:
    host, foreseen, ended = Host(6), request(OddTokens()), request(OddTokens())
    foreseen.output_ids.append(68)  # its grammar has gone on beyond the token that is drawn now
    ended.status = Status.FINISHED
    pause = host.pause(request(OddTokens()), request(), foreseen, ended)
    assert host.drawn is None, "that is the end of a pause"
    assert pause.end() == "drawn"
    drawn: Any = host.drawn
    assert [allowed(row) for row in drawn] == [ODD, ALL, [68], ALL, ALL, ALL]


def test_what_was_allowed_before_is_forgotten() -> None:
    host = Host(3)
    host.buffer[:] = 0
    assert host.pause(request(), request(processor=None)).end() == "drawn"
    assert host.drawn is not None and [allowed(row) for row in host.drawn[:2]] == [ALL, ALL]


def test_a_grammar_that_fails_ends_its_own_request_alone() -> None:
    host, failing = Host(3), request(OddTokens(error="too many states"))
    assert host.pause(request(OddTokens()), failing).end() == "drawn"
    assert host.failed == [(failing, "grammar: too many states")]
    assert host.drawn is not None and [allowed(row) for row in host.drawn[:2]] == [ODD, ALL]


def test_nothing_is_drawn_for_nobody() -> None:
    for wanted in (None, Wanted(top=0, ids=0, of_inputs=False)):
        host, ended = Host(2), request(OddTokens())
        ended.status = Status.FINISHED
        assert host.pause(ended, ended, wanted=wanted).end() == "nothing drawn"
    amidst_prompt = host.pause(request(OddTokens()), num_draws=0)
    assert amidst_prompt.end() == "nothing drawn" and host.drawn is None
    told = host.pause(request(), num_draws=0, wanted=Wanted(top=0, ids=0, of_inputs=False))
    assert told.end() == "drawn"


def test_processors_have_their_say_behind_the_grammars() -> None:
    class Lifts:
        def __call__(self, logits: np.ndarray, params: Any, *views: Any) -> np.ndarray:
            return logits + 1

    class Fails:
        def __call__(self, *given: Any) -> np.ndarray:
            raise RuntimeError("no")

    host, lifts = Host(4), Lifts()
    rows = request(OddTokens(), lifts), request(), request(None, Fails()), request(None, lifts)
    logits = host.pause(*rows).end()
    assert logits[:, 0].tolist() == [1, 0, 0, 1]
    assert host.drawn is not None and allowed(host.drawn[0]) == ODD
    assert host.failed == [(rows[2], "custom_logit_processor: RuntimeError: no")]


@pytest.mark.parametrize("overlaps", [True, False])
def test_tokens_are_the_same_whoever_fills_the_masks(
    monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    """Requests come and go while others are amidst their texts, more than there are rows."""
    texts = {"regex": r"(red|green|blue)( [a-z]{3,9}){2,6}", "json_schema": '{"type": "boolean"}'}
    sizes: dict[str, Any] = SMALL | dict(disable_overlap_schedule=not overlaps)
    params = [
        {
            "temperature": 1.0,
            "max_new_tokens": 8 + 5 * (index % 7),
            "sampling_seed": index,
            **({} if index % 5 == 4 else dict([list(texts.items())[index % 4 == 3]])),
        }
        for index in range(24)
    ]
    with jaxengine.Engine(**sizes) as engine:
        check_books(engine)
        found = []
        for least in (1, 100):  # beside the engine's thread, and on it
            monkeypatch.setattr(grammar, "MIN_BESIDE", least)
            results = engine.generate(["for", "import"] * 12, params)
            found.append([result["output_ids"] for result in results])
    assert found[0] == found[1]
