"""What is measured: how many prompts of which lengths, how many tokens are generated, and how a
time becomes a figure. Numbers only: it knows neither engines nor models, and imports no jax.

Prompts are random token ids, uniform over the vocabulary, without shared prefixes; the end of a
sequence is ignored and nothing is turned into text. A time is the wall time of one call.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["step", "prefill", "job"]
GREEDY: Mapping[str, Any] = {"temperature": 0.0}

SINGLE_PROMPT, SINGLE_STEPS = 128, 256
STEP_PROMPT, STEP_STEPS = 1024, 128
CHOICE_CONTEXTS, CHOICES, CHOICE_CONTEXT, CHOICE_END = 64, 4, 512, 8

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer"},
    },
    "required": ["name", "size", "count"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}  # nothing ends before its tokens do
UNDER_SCHEMA: Mapping[str, Any] = {"temperature": 1.0, "json_schema": json.dumps(SCHEMA)}

DEFAULT = [
    *("single", "step-32", "step-128", "prefill-32", "prefill-128", "prefill-4k", "score"),
    *("nano", "offline", "offline-p", "start"),
]

HELP = """\
workloads:
  single       1 prompt of 128; (time for 257 tokens - time for 1 token) / 256, greedy: ms per token
  step-B       B prompts of 1024; (time for 129 tokens - time for 1) / 128, greedy: ms per step
  prefill-B    B prompts of 1024, 1 token out: prompt tokens a second
  prefill-4k   32 prompts of 4096, 1 token out: prompt tokens a second
  json-B       step-B under a JSON schema, temperature 1, where a forced token takes no step of its
               own; needs a tokenizer
  score        64 prompts of 1024 and the log-probability of each of their tokens, 1 token out
  choice       4 continuations of 8 tokens of each of 64 contexts of 512, and the log-probability of
               each of their tokens: prompt tokens a second, where each context counts 4 times
  choice-whole the same sizes, with 256 contexts that have nothing in common
  nano         256 prompts of 100-1024 tokens, 100-1024 out, temperature 0.6: output tokens a second
  offline      1024 prompts of 32-1024 tokens, 32-512 out, temperature 1: output tokens a second
  offline-p    the same sizes, temperature 0.8, top_p 0.95
  start        constructor of the engine to ready, in seconds, phase by phase
"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call, or for a step the difference of two: all tokens asked for, and one token."""

    name: str
    kind: Kind
    unit: str
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)
    scored_from: int | None = None  # first prompt token with a log-probability, if any has one
    num_sharing: int = 1  # consecutive prompts that have their first tokens in common
    num_shared: int = 0  # so many

    @property
    def higher_is_better(self) -> bool:
        return self.kind != "step"

    @property
    def num_rows(self) -> int:
        return len(self.prompt_lens)

    @property
    def needs_text(self) -> bool:
        return "json_schema" in self.sampling

    @property
    def num_steps(self) -> int:
        """Decode steps that the difference of the two calls is divided by."""
        return self.output_lens[0] - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(sum, zip(self.prompt_lens, self.output_lens, strict=True)))

    @property
    def num_resident(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.prompt_lens) + sum(self.output_lens)

    def value(self, seconds: float) -> float:
        """The figure for a call (for a step: one step) of so many seconds."""
        if self.kind == "step":
            return seconds * 1e3
        counted = self.prompt_lens if self.kind == "prefill" else self.output_lens
        return sum(counted) / seconds


def find(names: str, scale: float = 1.0) -> tuple[list[Workload], bool]:
    """The workloads of a comma-separated list, and whether `start` is among them.

    `scale` below 1 shrinks every number of them, for smoke tests.

    Raises:
        ValueError: a name that is no workload, or twice the same.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if listed.count(name) > 1:
            raise ValueError(f"--workloads: {name} is listed twice; name each once")
    if not listed:
        raise ValueError(f"--workloads: expected names such as {','.join(DEFAULT)}, got none")
    return [_find(name, scale) for name in listed if name != "start"], "start" in listed


def _find(name: str, scale: float) -> Workload:
    if name in NAMED:
        return NAMED[name](name, scale)
    match = re.fullmatch(r"(step|prefill|json)-([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            f"--workloads: there is no workload {name!r}; the names are single, step-B, json-B and "
            "prefill-B for a number B of prompts, prefill-4k, score, choice, choice-whole, nano, "
            "offline, offline-p and start"
        )
    B = int(match[2])
    if match[1] == "prefill":
        return _prefill(name, scale, B, STEP_PROMPT)
    return _steps(name, scale, B, GREEDY if match[1] == "step" else UNDER_SCHEMA)


def _single(name: str, scale: float) -> Workload:
    return Workload(
        name=name,
        kind="step",
        unit="ms per token",
        prompt_lens=_scaled([SINGLE_PROMPT], scale),
        output_lens=(1 + _scaled([SINGLE_STEPS], scale)[0],),
    )


def _steps(name: str, scale: float, B: int, sampling: Mapping[str, Any]) -> Workload:
    rows = _scaled([B], scale)[0]
    return Workload(
        name=name,
        kind="step",
        unit="ms per step",
        prompt_lens=_scaled([STEP_PROMPT], scale) * rows,
        output_lens=(1 + _scaled([STEP_STEPS], scale)[0],) * rows,
        sampling=sampling,
    )


def _prefill(
    name: str, scale: float, B: int, length: int, scored_from: int | None = None
) -> Workload:
    rows = _scaled([B], scale)[0]
    return Workload(
        name=name,
        kind="prefill",
        unit="prompt tok/s",
        prompt_lens=_scaled([length], scale) * rows,
        output_lens=(1,) * rows,
        scored_from=scored_from,
    )


def _choice(name: str, scale: float) -> Workload:
    [context], [end] = _scaled([CHOICE_CONTEXT], scale), _scaled([CHOICE_END], scale)
    rows = CHOICES * _scaled([CHOICE_CONTEXTS], scale)[0]
    return Workload(
        name=name,
        kind="prefill",
        unit="prompt tok/s",
        prompt_lens=(context + end,) * rows,
        output_lens=(0,) * rows,
        scored_from=context - 1,
        num_sharing=1 if name == "choice-whole" else CHOICES,
        num_shared=0 if name == "choice-whole" else context,
    )


def _job(
    seed: int, count: int, prompt: tuple[int, int], output: tuple[int, int], **sampling: float
) -> Callable[[str, float], Workload]:
    """All prompt lengths are drawn first, then all output lengths, from one generator; token ids
    come from another. (nano-vllm's own script draws ids in between, so its totals differ.)"""

    def make(name: str, scale: float) -> Workload:
        draw = random.Random(seed)
        prompts = [draw.randint(*prompt) for _ in range(count)]
        outputs = [draw.randint(*output) for _ in range(count)]
        kept = _scaled([count], scale)[0]
        return Workload(
            name=name,
            kind="job",
            unit="output tok/s",
            prompt_lens=_scaled(prompts[:kept], scale),
            output_lens=_scaled(outputs[:kept], scale),
            sampling=sampling,
        )

    return make


def _scaled(numbers: Sequence[int], scale: float) -> tuple[int, ...]:
    return tuple(max(1, round(number * scale)) for number in numbers)


NAMED: dict[str, Callable[[str, float], Workload]] = {
    "single": _single,
    "prefill-4k": lambda name, scale: _prefill(name, scale, 32, 4096),
    "score": lambda name, scale: _prefill(name, scale, 64, STEP_PROMPT, scored_from=0),
    "choice": _choice,
    "choice-whole": _choice,
    "nano": _job(0, 256, (100, 1024), (100, 1024), temperature=0.6),
    "offline": _job(1, 1024, (32, 1024), (32, 512), temperature=1.0),
    "offline-p": _job(1, 1024, (32, 1024), (32, 512), temperature=0.8, top_p=0.95),
}
