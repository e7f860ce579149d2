"""One request: what was asked, what has come of it, and where its sequence stands. Plain data.

Lengths of a sequence, in tokens, as they are once every step planned so far has run:

    [ -------------------------- length: known or on the device ------------------------ ]
    [ --------- num_tokens: known to the host -------- ][ in_flight: drawn, not yet seen ]
    [ ---- num_computed: K and V written ---- ][ --------- num_pending: to compute ------ ]

`num_to_compute` is where `num_computed` ends: the last token drawn is never read. The device knows
all of `length` but for the `unsent` tokens at its end, which the host foresaw.
"""

import enum
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxengine.hidden_states import StateBooks
from jaxengine.logprobs import Logprobs
from jaxengine.prefix_tree import Node
from jaxengine.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Progress(NamedTuple):
    """A moment of a request, for whoever reads it from another thread."""

    num_tokens: int = 0
    finish_reason: dict[str, Any] | None = None
    stop_text: str | None = None  # the text to show, where stop strings are watched
    weight_version: str = "default"  # of the weights by then


@dataclass(eq=False, kw_only=True)
class Request:
    """A sequence that is being continued. The scheduler owns the second half of the fields."""

    rid: str
    prompt_ids: array  # unsigned, of 32 bits
    sampling: SamplingParams
    max_new_tokens: int  # resolved: prompt and output fit the context and the pool
    stop_token_ids: frozenset[int]  # resolved: end-of-sequence ids included unless ignored
    seed: int
    priority: int = 0
    logprobs: Logprobs | None = None  # where some are asked for
    states: StateBooks | None = None  # hidden ones, where some are asked for
    group: tuple["Request", ...] = ()  # those, with itself, whose tokens are drawn side by side
    matcher: Any = None  # a `Matcher`, where a grammar says which tokens may come
    skips_forced: bool = False  # tokens that it leaves no choice of are not drawn
    processor: Any = None  # a `CustomLogitProcessor`
    stop_text: Any = None  # `results.StopText`, where there are stop strings
    stream_interval: int | None = None  # None: report the end only
    report: Callable[[], None] = lambda: None  # called by the loop's thread after new progress
    arrival_time: float = field(default_factory=time.time)

    output_ids: list[int] = field(default_factory=list)
    embedding: Any = None  # float32 `[size]`, of an engine that makes them
    finish_reason: dict[str, Any] | None = None
    finish_time: float | None = None
    progress: Progress = Progress()
    num_cached: int | None = None  # prompt tokens found in the prefix tree at first admission
    num_retractions: int = 0
    memory: Any = None  # of registered functions, while it is not on the device

    status: Status = Status.WAITING
    order: tuple = ()  # place in the queue
    unsent: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)  # the prefix tree's nodes of the first pages
    num_computed: int = 0
    length: int = field(init=False)
    num_to_compute: int = field(init=False)

    def __post_init__(self):
        self.length = self.num_tokens
        self.num_to_compute = len(self.prompt_ids) + max(self.max_new_tokens - 1, 0)

    @property
    def token_ids(self) -> array:
        return self.prompt_ids + array("I", self.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def in_flight(self) -> int:
        return self.length - self.num_tokens

    @property
    def num_pending(self) -> int:
        return self.length - self.num_computed

    @property
    def mates(self) -> tuple["Request", ...]:
        """All of its group, or itself."""
        return self.group or (self,)

    @property
    def pauses(self) -> bool:
        """Whether the host has its say before each token is drawn."""
        has_say = self.matcher is not None or self.processor is not None
        return has_say and self.max_new_tokens > 0

    @property
    def asks_more(self) -> bool:
        """Whether its steps do more than draw tokens. All in one, as every row of every step is
        asked."""
        return not (self.logprobs is self.states is self.matcher is self.processor is None)

    @property
    def shares_prefix(self) -> bool:
        """Whether its K and V are those of every request with the same tokens."""
        return not self.sampling.interventions

    @property
    def can_run(self) -> bool:
        """Whether a step has something to compute for it, as far as is known one step ahead."""
        return self.num_computed < self.num_to_compute

    def foresee(self, token: int) -> None:
        """Adds a token that is sure to come next, be it in flight or not."""
        self.output_ids.append(token)
        if self.num_tokens > self.length:
            self.unsent.append(token)
            self.length = self.num_tokens

    def publish(self, weight_version: str) -> None:
        """Makes the present state visible to the caller's thread."""
        text = None if self.stop_text is None else self.stop_text.shown
        self.progress = Progress(len(self.output_ids), self.finish_reason, text, weight_version)
        self.report()
