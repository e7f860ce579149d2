"""Whatever the scheduler does, every request comes out as if it had been alone: greedy tokens equal
the naive loop's, sampled ones those of a plain run. The books are checked after every step."""

import random
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from naive import naive_greedy
from tiny import save_checkpoint, tiny_config

from jaxengine.loop import Loop
from jaxengine.request import Request
from jaxengine.sampling_params import SamplingParams
from jaxengine.scheduler import Scheduler
from jaxengine.server_args import ServerArgs
from jaxengine.startup import Started, start

PAGE_SIZE = 4
CONTEXT = 96
SLOTS = 6
STEPS = 3  # of one launch
PLENTY, SCARCE = 400, 30  # pages; one request may need 24

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": dict(overlaps=False, shares_prefixes=False, chunk_size=CONTEXT, can_chunk=False),
    "overlapped": dict(chunk_size=CONTEXT, can_chunk=False, shares_prefixes=False),
    "chunked": dict(chunk_size=8, shares_prefixes=False),
    "prefixes": dict(chunk_size=CONTEXT),
    "prefixes in chunks": dict(chunk_size=11),
    "prefixes, plain loop": dict(chunk_size=11, overlaps=False),
    "unmixed": dict(chunk_size=16, mixes_decode=False),
    "several steps a launch": dict(chunk_size=32, decode_steps=STEPS),
    "several steps, unmixed, plain loop": dict(
        chunk_size=16, mixes_decode=False, overlaps=False, decode_steps=STEPS
    ),
    "scarce pages, several steps a launch": dict(
        chunk_size=16, num_pages=SCARCE, conservativeness=0.0, decode_steps=STEPS
    ),
    "lpm": dict(chunk_size=32, policy="lpm"),
    "scarce pages": dict(chunk_size=16, num_pages=SCARCE, conservativeness=0.0),
    "scarce pages, no prefixes": dict(
        chunk_size=CONTEXT, num_pages=SCARCE, conservativeness=0.0, shares_prefixes=False
    ),
    "scarce pages, plain loop": dict(
        chunk_size=7, num_pages=SCARCE, conservativeness=0.0, overlaps=False
    ),
}


class KeptOpen:
    """A runner that outlives its loop, so that all variants share one compilation."""

    def __init__(self, runner: Any):
        self.pack, self.submit, self.collect = runner.pack, runner.submit, runner.collect
        self.collect_logprobs, self.collect_states = runner.collect_logprobs, runner.collect_states
        self.collect_embeddings = runner.collect_embeddings

    def close(self) -> None:
        pass


@dataclass
class Job:
    """A prompt with its parameters, and what became of it."""

    prompt: list[int]
    params: dict[str, Any]
    seed: int
    request: Request = field(init=False)


def started(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    sizes: list[int] | None = None,
    **overrides: Any,
) -> Any:
    """An engine's parts, with decoding steps of these numbers of rows, and its naive loop."""
    folder = tmp_path_factory.mktemp(family)
    save_checkpoint(folder, tiny_config(family, **overrides), seed=1)
    parts = start(
        ServerArgs(
            model_path=str(folder),
            skip_tokenizer_init=True,
            page_size=PAGE_SIZE,
            context_length=CONTEXT,
            max_running_requests=SLOTS,
            max_total_tokens=PLENTY * PAGE_SIZE,
            chunked_prefill_size=CONTEXT,
            num_continuous_decode_steps=STEPS,
            cuda_graph_bs=sizes,
            show_progress=False,
            device="cpu",
        )
    )
    return parts, naive_greedy(folder, CONTEXT)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    parts, naive = started(tmp_path_factory, "qwen3")
    yield parts, naive
    parts.loop.stop()


def draw_jobs(count: int, seed: int, **params: Any) -> list[Job]:
    """Prompts of every length, some with a beginning in common, some equal."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3, 320) for _ in range(rng.randint(1, 50))] for _ in range(8)]
    jobs = []
    for index in range(count):
        stem = rng.choice([[], [], *stems])
        own = [rng.randrange(3, 320) for _ in range(rng.choice([0, 1, 2, 5, 17, 30]))]
        prompt = (stem + own)[:80] or [7]
        length = rng.randint(1, min(14, CONTEXT - len(prompt)))
        jobs.append(Job(prompt, {"max_new_tokens": length, "ignore_eos": True, **params}, index))
    return jobs


def run(parts: Started, jobs: Sequence[Job], aborts: random.Random | None = None, **variant: Any):
    """All jobs through a scheduler and loop of this variant; retractions, steps."""
    overlaps = variant.pop("overlaps", True)
    settings: dict[str, Any] = dict(
        num_pages=PLENTY, page_size=PAGE_SIZE, max_running_requests=SLOTS
    )
    scheduler = Scheduler(**(settings | variant))
    loop = Loop(scheduler, KeptOpen(parts.loop.runner), overlaps=overlaps)
    left = threading.Semaphore(0)
    for index, job in enumerate(jobs):
        job.request = Request(
            rid=str(index),
            prompt_ids=array("I", job.prompt),
            sampling=SamplingParams(**job.params),
            max_new_tokens=job.params["max_new_tokens"],
            stop_token_ids=frozenset(),
            seed=job.seed,
            report=left.release,
        )

    def after_step() -> None:
        scheduler.check_integrity()
        if aborts is not None and aborts.random() < 0.3:
            victims = [job.request.rid for job in jobs if job.request.finish_reason is None]
            loop.abort([aborts.choice(victims)] if victims else [])

    loop.after_step.append(after_step)
    loop.start()
    loop.add([job.request for job in jobs]).result()
    for _ in jobs:
        assert left.acquire(timeout=120), f"nothing more came; error {loop.error!r}"
    assert loop.call(scheduler.flush_cache).result()
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_pages
    loop.stop()
    assert loop.error is None
    return sum(job.request.num_retractions for job in jobs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_greedy_tokens_equal_the_naive_loop(qwen: Any, variant: str) -> None:
    parts, naive = qwen
    jobs = draw_jobs(120, seed=3, temperature=0)
    num_retracted = run(parts, jobs, **VARIANTS[variant])
    for job in jobs:
        expected = naive(job.prompt, job.params["max_new_tokens"])
        assert job.request.output_ids == expected, job.prompt
    assert (num_retracted > 0) == variant.startswith("scarce"), num_retracted
    shares = VARIANTS[variant].get("shares_prefixes", True)
    assert any(job.request.num_cached for job in jobs) == shares
    assert parts.compile_counter.count == 0


def test_aborts_at_any_moment_leave_the_others_as_they_would_be(qwen: Any) -> None:
    parts, naive = qwen
    jobs = draw_jobs(120, seed=4, temperature=0)
    run(parts, jobs, random.Random(0), **(VARIANTS["scarce pages"] | {"chunk_size": 13}))
    reasons = [job.request.finish_reason["type"] for job in jobs if job.request.finish_reason]
    assert 5 < reasons.count("abort") < len(jobs) - 5
    for job in jobs:
        expected = naive(job.prompt, job.params["max_new_tokens"])
        assert job.request.output_ids == expected[: len(job.request.output_ids)]
        if job.request.finish_reason == {"type": "length", "length": len(expected)}:
            assert job.request.output_ids == expected


def test_sampled_tokens_depend_on_seed_and_position_alone(qwen: Any) -> None:
    parts, _ = qwen
    mixtures = [
        dict(temperature=1.0),
        dict(temperature=0.7, top_p=0.9, top_k=40),
        dict(temperature=0),
        dict(temperature=1.3, min_p=0.02, frequency_penalty=0.5, presence_penalty=0.2),
        dict(temperature=0.9, repetition_penalty=1.3, logit_bias={5: 2.0, 9: -3.0}),
    ]
    runs = []
    for variant in ("plain", "prefixes in chunks", "scarce pages"):
        jobs = draw_jobs(60, seed=5)
        for index, job in enumerate(jobs):
            job.params |= mixtures[index % len(mixtures)]
        run(parts, jobs, **VARIANTS[variant])
        runs.append([job.request.output_ids for job in jobs])
    assert runs[0] == runs[1]
    assert runs[0] == runs[2]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 9}),
        ("llama", {"rope": "dynamic"}),
        ("qwen2", {"heads": "mqa", "rope": "yarn", "tie_word_embeddings": True}),
    ],
    ids=["sliding window", "dynamic rope", "yarn, tied, multi-query"],
)
def test_other_families_equal_the_naive_loop(
    tmp_path_factory: pytest.TempPathFactory, family: str, overrides: dict[str, Any]
) -> None:
    parts, naive = started(tmp_path_factory, family, [SLOTS], **overrides)
    jobs = draw_jobs(40, seed=6, temperature=0)
    variant: dict[str, Any] = dict(chunk_size=13, num_pages=SCARCE, conservativeness=0.0)
    run(parts, jobs, shares_prefixes=parts.loop.scheduler.kv.shares_prefixes, **variant)
    for job in jobs:
        assert job.request.output_ids == naive(job.prompt, job.params["max_new_tokens"])
    parts.loop.stop()
