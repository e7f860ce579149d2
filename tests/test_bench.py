"""The benchmark: its workloads are the published ones, its floors the ones worked out by hand, and
a shrunken run goes through all of it."""

import dataclasses
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from cuda import as_on_a_gpu

from jaxengine import cli
from jaxengine.bench import (
    ceilings,
    command,
    floors,
    kernel_cases,
    kernels,
    options,
    reference,
    report,
    timing,
    workloads,
)
from jaxengine.bench.cache import compile_cache
from jaxengine.bench.case import Case
from jaxengine.bench.floors import Ceilings, Work
from jaxengine.bench.measure import (
    Measured,
    measure,
    obstacle,
    prompts_of,
    random_prompts,
    timed_call,
)
from jaxengine.bench.probe import Probe, probed
from jaxengine.bench.workloads import Workload
from jaxengine.models.config import ModelConfig
from jaxengine.models.shapes import SHAPES
from jaxengine.sampling_params import SamplingParams

H200 = Ceilings(4.45e12, 772e12)  # measured there
SMALL = (
    "--device cpu --context-length 256 --max-running-requests 4 --chunked-prefill-size 32 "
    "--page-size 8 --cuda-graph-bs 4 --max-total-tokens 1024 --no-show-progress"
).split()


def workload(name: str, scale: float = 1.0) -> Workload:
    (found,), _ = workloads.find(name, scale)
    return found


def model(shape: str) -> floors.Costs:
    config = ModelConfig.from_dict(SHAPES[shape])
    return floors.costs(config, weight_itemsize=2, cache_itemsize=2)


def parsed(*words: str) -> Any:
    args = cli._parser().parse_args(["bench", *words])
    args.command = ""
    return args


def mistake(*words: str) -> str:
    with pytest.raises(ValueError) as raised:
        options.read(parsed(*words))
    return str(raised.value)


# Workloads


@pytest.mark.parametrize(
    ("name", "count", "prompt", "output"),
    [
        ("single", 1, 128, 257),
        ("step-32", 32, 1024, 129),
        ("step-128", 128, 1024, 129),
        ("prefill-32", 32, 1024, 1),
        ("prefill-128", 128, 1024, 1),
        ("prefill-4k", 32, 4096, 1),
        ("score", 64, 1024, 1),
    ],
)
def test_uniform_workloads_are_the_published_ones(
    name: str, count: int, prompt: int, output: int
) -> None:
    found = workload(name)
    assert found.prompt_lens == (prompt,) * count
    assert found.output_lens == (output,) * count
    assert found.sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("name", "count", "prompt_tokens", "output_tokens", "longest", "sampling"),
    [
        ("nano", 256, 144_831, 144_160, 2_044, {"temperature": 0.6}),
        ("offline", 1024, 549_016, 279_016, None, {"temperature": 1.0}),
        ("offline-p", 1024, 549_016, 279_016, None, {"temperature": 0.8, "top_p": 0.95}),
    ],
)
def test_drawn_workloads_never_change(
    name: str,
    count: int,
    prompt_tokens: int,
    output_tokens: int,
    longest: int | None,
    sampling: dict[str, float],
) -> None:
    found = workload(name)
    assert found.num_rows == count
    assert sum(found.prompt_lens) == prompt_tokens
    assert sum(found.output_lens) == output_tokens
    assert longest is None or found.longest == longest
    assert found.sampling == sampling


def test_a_step_is_the_difference_divided_by_its_steps() -> None:
    assert workload("single").num_steps == 256
    assert workload("step-32").num_steps == 128
    assert workload("single").value(0.002) == 2.0
    assert workload("prefill-32").value(2.0) == 16 * 1024
    assert workload("nano").value(10.0) == 14_416


def test_choices_share_their_contexts_or_nothing() -> None:
    shared, whole = workload("choice"), workload("choice-whole")
    assert shared.prompt_lens == whole.prompt_lens == (520,) * 256
    assert shared.output_lens == (0,) * 256 and shared.scored_from == whole.scored_from == 511
    for found, num_contexts in ((shared, 64), (whole, 256)):
        prompts = prompts_of(found, np.random.default_rng(0), vocab_size=1000)
        assert len({tuple(prompt[:512]) for prompt in prompts}) == num_contexts
        assert len({tuple(prompt) for prompt in prompts}) == 256
        assert prompts[0][:512] == prompts[3][:512] or found is whole
    costs = model("llama-3.1-8b")
    times = [floors.floor(costs, found, H200, 256).work.num_flops for found in (shared, whole)]
    assert times[1] / times[0] == pytest.approx(520 / (520 / 4 + 8 * 3 / 4), rel=0.03)


def test_a_step_under_a_schema_is_asked_of_engines_with_text_alone() -> None:
    found = workload("json-64")
    assert (found.prompt_lens, found.num_steps) == (workload("step-64").prompt_lens, 128)
    assert SamplingParams(**found.sampling).grammar is not None
    assert "json-64 needs a tokenizer" in mistake("--shape", "qwen3-0.6b", "--workloads", "json-64")
    args = parsed("--workloads", "json-64")
    options.read(args)
    assert args.skip_tokenizer_init is False
    args = parsed("--workloads", "step-64")
    options.read(args)
    assert args.skip_tokenizer_init is True


def test_scale_shrinks_all_numbers_and_none_to_nothing() -> None:
    found = workload("nano", 0.02)
    assert found.num_rows == 5 and 2 <= min(found.prompt_lens) and found.longest <= 42
    for name in workloads.DEFAULT[:-1]:
        tiny = workload(name, 0.0001)
        assert tiny.num_rows == 1 and tiny.prompt_lens == (1,) and max(tiny.output_lens) <= 2


def test_the_default_lists_every_workload_and_the_help_explains_each() -> None:
    found, times_start = workloads.find(",".join(workloads.DEFAULT))
    assert times_start and len(found) == len(workloads.DEFAULT) - 1
    for name in [*workloads.NAMED, "step-B", "prefill-B", "start"]:
        assert f"\n  {name} " in workloads.HELP


@pytest.mark.parametrize("name", ["scores", "step-0", "step-", "step-x", "Nano", "prefill-4K"])
def test_unknown_workloads_are_refused_with_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"no workload '{name}'; the names are single, step-B"):
        workloads.find(f"single,{name}")
    with pytest.raises(ValueError, match="listed twice"):
        workloads.find("single,nano,single")
    with pytest.raises(ValueError, match="got none"):
        workloads.find(" , ")


# Floors


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [  # worked out on their own, with the same two ceilings
        ("qwen3-0.6b", "single", 0.27),
        ("qwen3-0.6b", "step-32", 1.16),
        ("qwen3-0.6b", "step-128", 3.9),
        ("qwen3-0.6b", "prefill-128", 773_000),
        ("qwen3-0.6b", "nano", 37_500),
        ("llama-3.1-8b", "single", 3.38),
        ("llama-3.1-8b", "step-32", 4.4),
        ("llama-3.1-8b", "step-128", 7.5),
        ("llama-3.1-8b", "prefill-128", 54_300),
        ("llama-3.1-8b", "nano", 14_000),
    ],
)
def test_floors_agree_with_the_published_table(shape: str, name: str, expected: float) -> None:
    found = workload(name)
    floor = floors.floor(model(shape), found, H200, max_running=256)
    assert found.value(floor.seconds) == pytest.approx(expected, rel=0.04)


def test_weights_and_cache_are_those_of_the_models() -> None:
    small, large = model("qwen3-0.6b"), model("llama-3.1-8b")
    assert small.weight_bytes == pytest.approx(1.19e9, rel=0.01)
    assert large.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    assert small.layer_kv_bytes * 28 == 114_688 and large.layer_kv_bytes * 32 == 131_072
    assert small.embedding_params == 0 and large.embedding_params == large.head_params
    assert large.num_params == pytest.approx(8.03e9, rel=0.001)


def test_a_window_bounds_what_is_seen() -> None:
    config = ModelConfig.from_dict(SHAPES["qwen3-0.6b"])
    windows = (4,) * 10 + (None,) * 18
    mixed = floors.costs(
        dataclasses.replace(config, sliding_window=windows),
        weight_itemsize=2,
        cache_itemsize=2,
    )
    lengths = np.array([1, 4, 9])
    assert mixed.seen(lengths) == 18 * 14 + 10 * (1 + 4 + 4)
    by_hand = sum(min(position + 1, 4) for length in lengths for position in range(length))
    in_full = sum(position + 1 for length in lengths for position in range(length))
    assert mixed.pairs(lengths) == 18 * in_full + 10 * by_hand


def test_a_job_is_its_prefill_and_each_of_its_steps() -> None:
    costs = model("qwen3-0.6b")
    job = Workload(
        name="job", kind="job", unit="", prompt_lens=(5, 7, 9), output_lens=(3, 1, 2), sampling={}
    )
    decode = lambda *contexts: floors.decode(costs, np.array(contexts)).seconds(H200)
    reading = floors.prefill(costs, np.array([5, 7, 9])).seconds(H200)
    together = floors.floor(costs, job, H200, max_running=3)
    assert together.seconds == pytest.approx(reading + decode(6, 10) + decode(7))
    # One row at a time: the second prompt ends with its prefill, and needs no step.
    alone = floors.floor(costs, job, H200, max_running=1)
    assert alone.seconds == pytest.approx(reading + decode(6) + decode(7) + decode(10))


def test_the_larger_of_two_times_counts() -> None:
    assert Work(8.9e12, 1).seconds(H200) == 2
    assert Work(1, 772e12 * 3).seconds(H200) == 3


# Ceilings


def test_ceilings_are_measured_quickly() -> None:
    found = ceilings.measure(jax.devices("cpu")[0])
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.flops < 1e14


def test_too_little_memory_for_the_ceilings_names_the_way_out() -> None:
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1 << 30, "bytes_in_use": 1 << 30})
    with pytest.raises(ValueError, match="--mem-fraction-static, or give both --bandwidth and"):
        ceilings._room(device)


# Probe


ONE_STEP = SimpleNamespace(num_steps=1)


class FakeStep:
    """Done at some time of the fake clock."""

    def __init__(self, clock: "FakeClock", end: float):
        self.clock, self.end = clock, end

    def is_ready(self) -> bool:
        return self.clock.now >= self.end

    def is_deleted(self) -> bool:
        return False


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Launches take 1, steps 10, one after the other; `collect` waits. As of a device, a step is a
    tree of what it makes."""

    name = "fake"

    def __init__(self, clock: FakeClock):
        self.clock, self.free, self.closed = clock, 0.0, False

    def pack(self, plan: Any) -> None:
        return None

    def submit(self, plan: Any, packed: None = None) -> tuple[FakeStep, None]:
        self.clock.now += 1
        self.free = max(self.free, self.clock.now) + 10
        return FakeStep(self.clock, self.free), None

    def collect(self, step: tuple[FakeStep, None]) -> list[list[int]]:
        self.clock.now = max(self.clock.now, step[0].end)
        return [[1]]

    def collect_embeddings(self, step: FakeStep) -> None:
        return None

    def collect_logprobs(self, step: FakeStep) -> tuple[None, None]:
        return None, None

    def collect_states(self, step: FakeStep, wanted: Any) -> Any:
        raise AssertionError("nobody asks for any")

    def close(self) -> None:
        self.closed = True


def seen_ending(step: tuple[FakeStep, None]) -> Future[float]:
    end = Future[float]()
    end.set_result(step[0].end)
    return end


@pytest.fixture
def probe() -> Probe:
    clock = FakeClock()
    return Probe(FakeRunner(clock), seen_ending, clock)


def test_a_device_that_always_has_a_next_step_is_busy(probe: Probe) -> None:
    clock = probe._clock
    flying = probe.submit(ONE_STEP)
    for _ in range(5):
        clock.now += 3  # planning
        following = probe.submit(ONE_STEP)
        assert probe.collect(flying) == [[1]]
        clock.now += 2  # delivery
        flying = following
    probe.collect(flying)
    usage = probe.usage()
    assert usage.num_launches == usage.num_steps == 6
    assert usage.busy_seconds == 60  # all but the first launch
    assert usage.last - usage.first == 61
    assert usage.host_seconds == 1 + 5 * (3 + 1 + 2)


def test_time_without_a_step_in_flight_is_idle(probe: Probe) -> None:
    clock = probe._clock
    for num_steps in (1, 1, 1, 8):
        probe.collect(probe.submit(SimpleNamespace(num_steps=num_steps)))
        clock.now += 4
    usage = probe.usage()
    assert (usage.num_launches, usage.num_steps) == (4, 11)
    assert usage.busy_seconds == 4 * 10 and usage.last - usage.first == 4 * 11 + 3 * 4
    assert usage.host_seconds == 4 * 1 + 3 * 4


def test_a_step_is_busy_until_its_end_whoever_looks(probe: Probe) -> None:
    clock = probe._clock
    first = probe.submit(ONE_STEP)
    clock.now += 6
    second = probe.submit(ONE_STEP)
    clock.now += 100  # both end meanwhile
    probe.collect(first)
    probe.collect(second)
    assert probe.usage().busy_seconds == 10 + 10
    assert probe.usage().host_seconds == probe.usage().last  # it never had to wait


def test_a_probe_is_a_runner_else(probe: Probe) -> None:
    assert probe.name == "fake" and probe.usage() == (0, 0, 0.0, 0.0, 0.0, 0.0)
    probe.close()
    assert probe._runner.closed  # type: ignore[attr-defined]


# Measuring


def small(kind: Any, prompts: tuple[int, ...], outputs: tuple[int, ...]) -> Workload:
    return Workload(name="w", kind=kind, unit="", prompt_lens=prompts, output_lens=outputs)


def test_workloads_run_on_an_engine(make_engine: Any) -> None:
    engine = make_engine()
    runner = engine._loop.runner
    job = measure(engine, small("job", (9, 5, 12), (4, 1, 6)), vocab_size=200, repeat=2)
    assert len(job.seconds) == 2 and all(seconds > 0 for seconds in job.seconds)
    assert job.usage is not None and job.usage.num_steps >= 5
    assert job.busy_share is not None and 0 < job.busy_share <= 1
    assert job.host_seconds is not None and job.host_seconds > 0
    step = measure(engine, small("step", (9, 9), (5, 5)), vocab_size=200, repeat=1)
    assert step.usage is None and step.busy_share is None and step.median > 0
    assert engine._loop.runner is runner
    assert engine.get_server_info()["num_compilations_since_start"] == 0


def test_a_call_that_ends_early_is_an_error(make_engine: Any) -> None:
    engine = make_engine()
    prompt = random_prompts(np.random.default_rng(0), [3], 200)
    with pytest.raises(ValueError, match="do not fit"):
        timed_call(engine, prompt, [10_000], {})
    with pytest.raises(RuntimeError, match="generated 0 tokens instead of 3"):
        timed_call(engine, [[300]], [3], {})  # the checkpoint has no numbers for this token


def test_the_probe_leaves_when_the_call_fails(make_engine: Any) -> None:
    engine = make_engine()
    runner = engine._loop.runner
    with pytest.raises(KeyboardInterrupt), probed(engine):
        assert engine._loop.runner is not runner
        raise KeyboardInterrupt
    assert engine._loop.runner is runner


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prefill-4k", "--context-length 4097"),
        ("step-128", "--max-running-requests 128"),
        ("step-64", "--max-total-tokens 73792"),
        ("step-32", None),
        ("nano", None),
    ],
)
def test_what_the_engine_is_too_small_for_is_told(name: str, reason: str | None) -> None:
    info = dict(context_length=4096, max_running_requests=64, max_total_num_tokens=60_000)
    found = obstacle(workload(name), info)
    assert found is None if reason is None else reason in str(found)


# References


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_shipped_references_name_known_models_and_workloads(name: str) -> None:
    found = reference.load(name)
    assert found.gpu == "NVIDIA H200" and found.models.keys() >= {"qwen3-0.6b", "llama-3.1-8b"}
    for figures in found.models.values():
        workloads.find(",".join(figures))
    assert reference.load("vllm").figures("llama-3.1-8b")["single"] == 4.94
    assert reference.load("sglang").figures("qwen3-0.6b")["nano"] == 20_980
    assert found.figures("nobody's") == {}


def test_a_model_is_known_by_its_sizes() -> None:
    config = ModelConfig.from_dict(SHAPES["qwen3-8b"])
    assert reference.shape_name(config) == "qwen3-8b"
    assert reference.shape_name(dataclasses.replace(config, vocab_size=7)) is None


def test_files_that_are_no_reference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected vllm, sglang or a file, and 'vlm' is neither"):
        reference.load("vlm")
    path = tmp_path / "r.json"
    for text in ("no json", "[]", "{}", '{"rows": [], "scale": 0.5}', '{"models": {"m": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected what --json writes"):
            reference.load(str(path))


# Options


def test_defaults_are_those_of_the_comparison() -> None:
    args = parsed("--shape", "qwen3-0.6b")
    found = options.read(args)
    assert [each.name for each in found.workloads] == workloads.DEFAULT[:-1] and found.times_start
    assert args.model_path == "qwen3-0.6b" and args.load_format == "dummy"
    assert args.skip_tokenizer_init and args.mem_fraction_static == 0.9
    assert (found.context_length, found.max_running_requests) == (8192, 512)
    assert found.bandwidth is None and found.reference is None and found.repeat == 1


def test_engine_options_and_ceilings_can_be_given() -> None:
    args = parsed(
        "--mem-fraction-static", "0.5", "--page-size", "16", "--bandwidth", "4.45", "--flops", "772"
    )
    found = options.read(args)
    assert args.mem_fraction_static == 0.5 and args.page_size == 16
    assert (found.bandwidth, found.flops) == (4.45e12, 772e12)


def test_mistakes_name_the_option_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--scale: expected a number above 0 and at most 1, got 2" in mistake("--scale", "2")
    assert "--repeat: expected at least 1" in mistake("--repeat", "0")
    assert "--bandwidth: expected a number above 0" in mistake("--bandwidth", "-1")
    assert "--flops: expected a number above 0, got nan" in mistake("--flops", "nan")
    assert "give one of them" in mistake("--fresh-cache", "--cache-dir", "x")
    assert "give one of them" in mistake("--shape", "qwen3-0.6b", "--model", "x")
    assert "--shape: expected one of llama-3.1-8b" in mistake("--shape", "gpt-2")
    assert "has no files" in mistake("--shape", "qwen3-8b", "--load-format", "safetensors")
    assert "there is no folder" in mistake("--json", str(tmp_path / "no" / "x.json"))
    assert "is a folder" in mistake("--json", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--plot: needs matplotlib" in mistake("--plot", str(tmp_path / "x.png"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "ends in .png or .svg" in mistake("--plot", str(tmp_path / "x.jpeg"))


# The whole


@pytest.fixture
def settings() -> Iterator[None]:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    assert before == {name: jax.config.values[name] for name in names}


def test_the_cache_is_where_it_should_be_for_as_long(tmp_path: Path, settings: None) -> None:
    compile_anew = lambda: jax.jit(lambda x: x * 3 + 4).lower(1.0).compile()
    fresh = options.read(parsed("--fresh-cache"))
    with compile_cache(fresh) as facts:
        assert facts == {"folder": None, "files_before": 0}
        folder = Path(jax.config.values["jax_compilation_cache_dir"])
        compile_anew()
        assert list(folder.iterdir())
    assert not folder.exists()
    given = options.read(parsed("--cache-dir", str(tmp_path / "kept")))
    for expected in (False, True):
        with compile_cache(given) as facts:
            assert bool(facts["files_before"]) == expected
            compile_anew()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


NUMBERS = ("value", "floor", "of_floor")


@pytest.fixture
def finished(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: None
) -> tuple[str, dict[str, Any]]:
    words = ["bench", "--model", str(tiny_checkpoint), "--load-format", "dummy"]
    words += ["--scale", "0.01", "--repeat", "2"]
    words += ["--workloads", "single,step-200,prefill-200,nano,start,prefill-4k,step-800"]
    path = tmp_path / "report.json"
    assert cli.main([*words, "--json", str(path), "--reference", "vllm", *SMALL]) == 0
    return capsys.readouterr().out, json.loads(path.read_text())


def test_a_shrunken_run_from_end_to_end(finished: tuple[str, dict[str, Any]]) -> None:
    out, written = finished
    free = ("  cache ", "  machine ", "written: ")  # as long as names and paths are
    assert not [line for line in out.splitlines() if len(line) > 100 and not line.startswith(free)]
    assert "SMOKE TEST: all sizes times 0.01" in out and "nano x0.01" in out
    assert "vLLM 0.26.0 on NVIDIA H200: not compared with, at this scale" in out
    assert "step-800                 skipped: needs --max-running-requests 8" in out
    assert written["scale"] == 0.01 and not written["interrupted"]
    assert written["skipped"].keys() == {"step-800"}
    names = [row["workload"] for row in written["rows"]]
    assert names == [
        *("start", "single", "step-200", "prefill-200", "nano", "nano gpu busy", "nano host"),
        "prefill-4k",
    ]
    for row in written["rows"]:
        timed = "floor_seconds" in row["details"]
        assert all(isinstance(row[name], float) for name in NUMBERS[: 3 if timed else 1])
        assert row["reference"] is None and row["speedup"] is None
        assert (
            math.isfinite(row["value"])
            and len(row["samples"]) == (2 if timed else 0)
            or (row["workload"] == "start")
        )
    start = written["start"]
    assert start["phases"].keys() >= {"weights", "compile", "warm up"}
    assert start["seconds"] >= start["phases"]["total"] and start["import_seconds"] >= 0
    assert written["model"]["num_params"] > 10_000 and written["model"]["dtype"] == "float32"
    assert written["model"]["weights"] == "random"
    assert written["machine"]["versions"]["jax"] == jax.__version__
    assert written["command"].startswith("jaxengine bench --model")
    assert written["engine"]["arguments"]["page_size"] == 8
    assert written["ceilings"]["bandwidth"] > 0


def test_an_interrupted_run_keeps_what_it_has(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(engine: Any, workload: Workload, **_: Any) -> Measured:
        if workload.name == "nano":
            raise KeyboardInterrupt
        return Measured(workload=workload, seconds=(0.5,))

    monkeypatch.setattr(command, "measure", interrupted)
    path = tmp_path / "report.json"
    words = ["--model", str(tiny_checkpoint), "--scale", "0.01", "--bandwidth", "1", "--flops", "2"]
    words += ["--workloads", "single,nano,prefill-2", "--json", str(path)]
    assert cli.main(["bench", *words, *SMALL]) == cli.INTERRUPTED
    assert "interrupted after 1 rows" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["interrupted"] and [row["workload"] for row in written["rows"]] == ["single"]
    assert written["ceilings"] == {"bandwidth": 1e12, "flops": 2e12}


def test_a_report_serves_as_reference(tmp_path: Path) -> None:
    found = workload("single")
    floor = floors.floor(model("qwen3-0.6b"), found, H200, 256)
    row = report.row(Measured(workload=found, seconds=(0.001, 0.003, 0.002)), floor, 4.0)
    assert (row.value, row.speedup, row.spread) == (2.0, 2.0, 1.0)
    assert row.of_floor == pytest.approx(0.137, rel=0.01)
    written = {
        "rows": [report.as_json(row)],
        "scale": 1,
        "jaxengine": "0.1",
        "machine": {"device": "G"},
        "model": {"name": "qwen3-0.6b"},
        "date": "d",
        "command": "c",
    }
    (tmp_path / "r.json").write_text(json.dumps(written))
    assert reference.load(str(tmp_path / "r.json")).figures("qwen3-0.6b") == {"single": 2.0}


def test_speed_relative_to_a_reference_is_above_one_where_we_are_faster() -> None:
    assert report.speedup(2.0, 3.0, higher_is_better=False) == 1.5
    assert report.speedup(2.0, 3.0, higher_is_better=True) == pytest.approx(2 / 3)
    assert report.speedup(2.0, None, higher_is_better=True) is None


def test_numbers_are_shown_with_the_digits_that_count() -> None:
    shown = [report.number(value) for value in (None, 0.27351, 6.514, 123.456, 23_170.4)]
    assert shown == ["-", "0.274", "6.51", "123.5", "23,170"]


# Kernels


def test_functions_are_timed_over_sets_of_arguments() -> None:
    sets = [(jax.numpy.full(100, float(i)), jax.numpy.ones(100)) for i in range(4)]
    assert timing.seconds_per_call(lambda x, y: x * 2 + y, sets) > 0
    _, results = timing.chained(lambda x, y: x * 2 + y, sets, None)([], sets)
    assert [float(result[0]) for result in results] == [1, 3, 5, 7]


def test_what_a_function_overwrites_is_handed_on() -> None:
    sets = [(jax.numpy.ones(3), jax.numpy.full(100, float(i))) for i in range(4)]
    add = lambda x, kept: (kept + x.sum(), x[0])
    program = timing.chained(add, sets, 1)
    kept, others = [kept for _, kept in sets], [(x,) for x, _ in sets]
    for _ in range(2):
        kept, results = program(kept, others)
    assert [float(new[0]) for new in kept] == [6, 7, 8, 9] and len(results) == 4
    sets = [(jax.numpy.ones(3), jax.numpy.zeros(100)) for _ in range(4)]
    assert timing.seconds_per_call(add, sets, in_place=1) > 0


@pytest.mark.parametrize(("size", "count"), [(1, 48), (1 << 24, 16), (1 << 40, 4)])
def test_sets_are_more_than_a_cache_holds_and_few_enough_to_compile(size: int, count: int) -> None:
    assert timing.num_sets(size) == count


def test_a_variant_that_fails_leaves_the_others() -> None:
    def fails(x: Any) -> Any:
        raise ValueError("it needs another GPU\nand more lines")

    case = Case(
        kernel="k",
        shape="s",
        make=lambda key: (jax.random.normal(key, (8,)),),
        variants={"kernel": fails, "xla": lambda x: x + 1},
        work=Work(8e6, 16e6),
    )
    failed, fine = kernels.time_case(case, H200)
    assert failed.seconds is None and failed.error == "ValueError: it needs another GPU"
    assert kernels.line(failed).endswith("kernel  failed: ValueError: it needs another GPU")
    assert fine.seconds is not None and fine.error is None
    assert fine.floor_seconds == Work(8e6, 16e6).seconds(H200)


def kernels_with_cases() -> list[str]:
    return [name for name, _ in kernels._modules() if name in kernel_cases.MAKERS]


@pytest.mark.parametrize("name", kernels_with_cases())
def test_the_variants_of_a_kernel_compute_the_same_from_the_same(name: str) -> None:
    found = list(kernels._chosen(name, ""))
    assert len({case.shape for case in found}) == len(found)
    for case in found[:: max(1, len(found) // 4)]:
        assert next(iter(case.variants)) == "kernel" and len(case.variants) > 1
        args = jax.eval_shape(case.make, jax.random.key(0))
        with as_on_a_gpu():
            results = [jax.eval_shape(function, *args) for function in case.variants.values()]
        assert all(result == results[0] for result in results)
        assert len(kernels.line(next(_timings(case)))) <= 100
        if case.in_place is not None:  # most of it is left alone
            continue
        moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((args, results[0])))
        assert 0.5 * moved < case.work.num_bytes <= moved * 1.01


def _timings(case: Case) -> Iterator[kernels.Timing]:
    yield kernels.Timing(
        kernel=case.kernel,
        shape=case.shape,
        variant="kernel",
        seconds=1.0,
        floor_seconds=1.0,
        num_bytes=1.0,
        num_flops=1.0,
    )


def test_every_kernel_has_cases() -> None:
    assert kernels_with_cases() == [name for name, _ in kernels._modules()]


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--list", "--shapes", "no such shape"]) == 0
    assert kernels.main(["--only", "nothing"]) == kernels.USER_ERROR
    assert "--only: expected some of" in capsys.readouterr().err
    if jax.default_backend() == "cpu":
        assert kernels.main([]) == kernels.USER_ERROR
        assert "kernels run on an NVIDIA GPU" in capsys.readouterr().err


# The picture


def test_a_report_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from jaxengine.bench.plot import draw

    costs, figures = model("llama-3.1-8b"), reference.load("vllm").figures("llama-3.1-8b")
    rows = []
    for name in ("single", "step-32", "step-128", "nano"):
        found = workload(name)
        floor = floors.floor(costs, found, H200, 256)
        measured = Measured(workload=found, seconds=(2 * floor.seconds,))
        rows.append(report.as_json(report.row(measured, floor, figures[name])))
    written = {
        "rows": [*rows, report.as_json(report.start_row(9.0, {}, None))],
        "ceilings": H200._asdict(),
        "reference": {"engine": "vLLM"},
        "model": {"name": "m", "dtype": "bfloat16"},
        "machine": {"device": "G"},
        "date": "2026-11-25T00:00:00",
        "scale": 1,
    }
    draw(written, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
