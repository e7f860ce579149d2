"""The least time that a device's memory and arithmetic allow for a workload: pure functions of a
model's config, of lengths, and of the device's two ceilings. It imports no jax.

A decode step reads every matrix once, the output head included and an untied embedding not, and the
keys and values of each row's context. A prefill multiplies every matrix by every prompt token, and
the head by the last one of each prompt; causal attention adds 4 N H per visible pair and layer.
The larger of the two times counts. A job is the sum over its decode steps, and its prompts on top:
no schedule here overlaps the two. Activations, norms and the KV write are left out: they are small,
and a floor must stay below what is possible. Dense decoders only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxengine.bench.workloads import Workload
from jaxengine.models.config import ModelConfig

NOTHING = np.zeros(0, int)


class Ceilings(NamedTuple):
    """What the device was seen to do at best."""

    bandwidth: float  # bytes a second, read only
    flops: float  # operations a second, of a large product


class Work(NamedTuple):
    """What has to be moved and computed; of jobs, the sum over steps."""

    num_bytes: float
    num_flops: float

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.num_bytes + other.num_bytes, self.num_flops + other.num_flops)

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bandwidth, self.num_flops / ceilings.flops)


class Floor(NamedTuple):
    seconds: float
    work: Work


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model costs, from its config alone."""

    body_params: int  # of all layers' matrices
    head_params: int
    embedding_params: int  # beside the head; 0 if that is the same matrix
    weight_itemsize: int
    layer_kv_bytes: int  # K and V of one token in one layer
    pair_flops: int  # of one query token seeing one kv token, in one layer
    windows: tuple[tuple[int | None, int], ...]  # sliding window -> layers that have it

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, but for norms and biases."""
        return self.body_params + self.head_params + self.embedding_params

    @property
    def weight_bytes(self) -> int:
        """Read by a step that computes logits."""
        return (self.body_params + self.head_params) * self.weight_itemsize

    def seen(self, contexts: np.ndarray) -> float:
        """kv tokens visible from the last token of each context, summed over contexts and
        layers."""
        return sum(
            layers * float(np.sum(contexts if window is None else np.minimum(contexts, window)))
            for window, layers in self.windows
        )

    def pairs(self, lengths: np.ndarray) -> float:
        """Visible pairs of causal attention over whole prompts, summed over prompts and layers."""
        lengths = lengths.astype(np.float64)
        total = 0.0
        for window, layers in self.windows:
            # The first `window` tokens see all before them, the later ones just the window.
            near = lengths if window is None else np.minimum(lengths, window)
            total += layers * float(np.sum(near * (near + 1) / 2 + (lengths - near) * near))
        return total


def costs(config: ModelConfig, *, weight_itemsize: int, cache_itemsize: int) -> Costs:
    D, H, F = config.hidden_size, config.head_size, config.intermediate_size
    N, K = config.num_heads, config.num_kv_heads
    head = config.vocab_size * D
    return Costs(
        body_params=config.num_layers * (D * (N + 2 * K) * H + N * H * D + 3 * D * F),
        head_params=head,
        embedding_params=0 if config.tie_embeddings else head,
        weight_itemsize=weight_itemsize,
        layer_kv_bytes=2 * K * H * cache_itemsize,
        pair_flops=4 * N * H,
        windows=tuple(Counter(config.sliding_window).items()),
    )


def floor(model: Costs, workload: Workload, ceilings: Ceilings, max_running: int) -> Floor:
    """Of one call; of one step for `step` workloads. `max_running` rows decode at a time."""
    prompts, outputs = np.array(workload.prompt_lens), np.array(workload.output_lens)
    if workload.kind == "prefill":
        # Of what several prompts have in common, all but the first time is saved.
        sharing = (workload.num_sharing - 1) * workload.num_rows // workload.num_sharing
        saved = np.full(sharing, workload.num_shared)
        num_logits = None
        if workload.scored_from is not None:
            num_logits = int((prompts - workload.scored_from).sum())
        work = prefill(model, prompts, num_logits, saved)
        return Floor(work.seconds(ceilings), work)
    if workload.kind == "job":
        return _job(model, prompts, outputs, ceilings, max_running)
    steps = [decode(model, prompts + step) for step in range(1, workload.num_steps + 1)]
    total = _sum(steps, ceilings)
    scale = 1 / len(steps)
    work = Work(total.work.num_bytes * scale, total.work.num_flops * scale)
    return Floor(total.seconds * scale, work)


def decode(model: Costs, contexts: np.ndarray) -> Work:
    """One token for each row; `contexts` are lengths with that token."""
    seen = model.seen(contexts)
    matrices = 2 * (model.body_params + model.head_params) * len(contexts)
    return Work(
        model.weight_bytes + seen * model.layer_kv_bytes, matrices + seen * model.pair_flops
    )


def prefill(
    model: Costs, lengths: np.ndarray, num_logits: int | None = None, saved: np.ndarray = NOTHING
) -> Work:
    """Whole prompts and the logits of their last tokens, or of so many; the matrices are read once.
    `saved` are the lengths of beginnings that need not be read again."""
    num_logits = len(lengths) if num_logits is None else num_logits
    num_tokens = float(lengths.sum() - saved.sum())
    pairs = model.pairs(lengths) - model.pairs(saved)
    matrices = 2 * (model.body_params * num_tokens + model.head_params * num_logits)
    return Work(model.weight_bytes, matrices + pairs * model.pair_flops)


def _job(
    model: Costs, prompts: np.ndarray, outputs: np.ndarray, ceilings: Ceilings, max_running: int
) -> Floor:
    """Prompts join in their order as soon as a row is free; each gets its first token from its
    prefill and one more from each decode step."""
    steps = []
    context, left = np.zeros(0, int), np.zeros(0, int)
    begun = 0
    while begun < len(prompts) or len(left):
        joining = slice(begun, begun + max_running - len(left))
        begun = min(joining.stop, len(prompts))
        context = np.concatenate([context, prompts[joining]])
        left = np.concatenate([left, outputs[joining] - 1])
        is_live = left > 0
        context, left = context[is_live] + 1, left[is_live] - 1
        if len(left):
            steps.append(decode(model, context))
        is_live = left > 0
        context, left = context[is_live], left[is_live]
    decoding, reading = _sum(steps, ceilings), prefill(model, prompts)
    return Floor(decoding.seconds + reading.seconds(ceilings), decoding.work + reading)


def _sum(steps: Sequence[Work], ceilings: Ceilings) -> Floor:
    seconds = sum(step.seconds(ceilings) for step in steps)
    return Floor(seconds, sum(steps, start=Work(0, 0)))
