"""Runs workloads on an engine and takes their times. It knows no limits and prints nothing."""

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxengine.bench.probe import Usage, probed
from jaxengine.bench.workloads import Workload
from jaxengine.engine import Engine

WARM_UP_ROWS, WARM_UP_PROMPT, WARM_UP_TOKENS = 8, 64, 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    workload: Workload
    seconds: tuple[float, ...]  # of each repetition: of a call, or for a step of one step
    usage: Usage | None = None  # of a job's last repetition
    usage_seconds: float = 0.0  # of that call

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def busy_share(self) -> float | None:
        """Share of the call's wall time in which a step was in flight."""
        return self.usage.busy_seconds / self.usage_seconds if self.usage else None

    @property
    def host_seconds(self) -> float | None:
        """What the loop's thread worked for each step."""
        return self.usage.host_seconds / self.usage.num_steps if self.usage else None


def obstacle(workload: Workload, info: Mapping[str, Any]) -> str | None:
    """Why an engine with this `get_server_info` cannot run the workload as it is meant."""
    needs = [("--context-length", workload.longest, info["context_length"])]
    pool, held = info["max_total_num_tokens"], workload.longest
    if workload.kind == "step":
        needs += [("--max-running-requests", workload.num_rows, info["max_running_requests"])]
        held = workload.num_resident
    needs += [("--max-total-tokens", held, pool)]
    for option, needed, there in needs:
        if needed > there:
            return f"needs {option} {needed}; this engine has {there}"
    return None


def measure(engine: Engine, workload: Workload, *, vocab_size: int, repeat: int) -> Measured:
    """Takes the time of a workload `repeat` times, after a small run of the same kind.

    Raises:
        RuntimeError: the engine failed or generated another number of tokens than asked for.
    """
    rng = np.random.default_rng(0)
    _warm_up(engine, workload, rng, vocab_size)
    seconds, usage = [], None
    for _ in range(repeat):
        prompts = prompts_of(workload, rng, vocab_size)
        with _frozen(engine):
            if workload.kind == "job":
                given = workload.output_lens, workload.sampling
                with probed(engine) as probe:
                    seconds.append(timed_call(engine, prompts, *given))
                usage = probe.usage()
            else:
                seconds.append(_seconds(engine, workload, prompts))
    return Measured(
        workload=workload, seconds=tuple(seconds), usage=usage, usage_seconds=seconds[-1]
    )


@contextmanager
def _frozen(engine: Engine) -> Iterator[None]:
    """Else one call in some waits 0.4 s, while Python looks for garbage in all imported modules."""
    engine.freeze_gc()
    try:
        yield
    finally:
        gc.unfreeze()


def timed_call(
    engine: Engine,
    prompts: list[list[int]],
    output_lens: Sequence[int],
    sampling: Mapping[str, Any],
    scored_from: int | None = None,
) -> float:
    """Wall time of generating `output_lens` tokens, with no prefix cached from before."""
    params = [{"ignore_eos": True, "max_new_tokens": length, **sampling} for length in output_lens]
    if not engine.flush_cache().success:
        raise RuntimeError("the engine has unfinished requests; nothing else may use it meanwhile")
    started = time.perf_counter()
    asked: dict[str, Any] = {}
    if scored_from is not None:
        asked = dict(return_logprob=True, logprob_start_len=scored_from)
    results = engine.generate(input_ids=prompts, sampling_params=params, **asked)
    seconds = time.perf_counter() - started
    for result, length in zip(results, output_lens, strict=True):
        if len(result["output_ids"]) != length:
            reason = result["meta_info"]["finish_reason"]
            raise RuntimeError(
                f"the engine generated {len(result['output_ids'])} tokens instead of {length}: "
                f"{reason}"
            )
    return seconds


def prompts_of(workload: Workload, rng: np.random.Generator, vocab_size: int) -> list[list[int]]:
    """Random ones, of which some begin alike where the workload says so."""
    prompts = random_prompts(rng, workload.prompt_lens, vocab_size)
    for index, prompt in enumerate(prompts):
        first = prompts[index - index % workload.num_sharing]
        prompt[: workload.num_shared] = first[: workload.num_shared]
    return prompts


def random_prompts(
    rng: np.random.Generator, lengths: Sequence[int], vocab_size: int
) -> list[list[int]]:
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def _seconds(engine: Engine, workload: Workload, prompts: list[list[int]]) -> float:
    given = workload.output_lens, workload.sampling, workload.scored_from
    every = timed_call(engine, prompts, *given)
    if workload.kind == "prefill":
        return every
    one = timed_call(engine, prompts, [1] * len(prompts), workload.sampling)
    # The difference of two noisy times may vanish where there is next to nothing to do.
    return max(every - one, 1e-9) / workload.num_steps


def _warm_up(engine: Engine, workload: Workload, rng: np.random.Generator, vocab_size: int) -> None:
    lengths = [min(length, WARM_UP_PROMPT) for length in workload.prompt_lens[:WARM_UP_ROWS]]
    outputs = [min(length, WARM_UP_TOKENS) for length in workload.output_lens[:WARM_UP_ROWS]]
    prompts = random_prompts(rng, lengths, vocab_size)
    if workload.scored_from is not None or workload.needs_text:  # programs to be compiled
        prompts, outputs = prompts_of(workload, rng, vocab_size), workload.output_lens
    timed_call(engine, prompts, outputs, workload.sampling, workload.scored_from)
    # What was compiled for that, or to measure ceilings, has cost the graphs of all steps.
    runner: Any = engine._loop.runner
    engine._loop.call(runner.warm_up).result()
