"""What the command `bench` does: starts an engine, measures workload after workload, shows a row as
soon as there is one, and writes what was asked for at the end, also after Ctrl-C."""

import dataclasses
import datetime
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxengine
from jaxengine import models
from jaxengine.bench import ceilings, floors, report
from jaxengine.bench.cache import compile_cache
from jaxengine.bench.floors import Ceilings, Costs
from jaxengine.bench.header import footer, header
from jaxengine.bench.machine import machine
from jaxengine.bench.measure import measure, obstacle
from jaxengine.bench.options import Options
from jaxengine.bench.reference import shape_name
from jaxengine.bench.workloads import Workload
from jaxengine.engine import Engine
from jaxengine.loading import choose_dtype, find_model
from jaxengine.models.config import ModelConfig
from jaxengine.server_args import ServerArgs

DENSE_TOLERANCE = 0.05  # share of the parameters that norms and biases may make up


@dataclass
class Report:
    """All that is known so far."""

    options: Options
    facts: dict[str, Any]  # of machine, model and engine, for JSON as they are
    rows: list[report.Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # workload -> reason
    interrupted: bool = False

    def add(self, row: report.Row) -> None:
        self.rows.append(row)
        print(report.line(row, self.options.scale), flush=True)

    def as_json(self) -> dict[str, Any]:
        reference = self.options.reference
        return {
            **self.facts,
            "scale": self.options.scale,
            "repeat": self.options.repeat,
            "reference": reference and {"engine": reference.engine, "gpu": reference.gpu},
            "rows": [report.as_json(row) for row in self.rows],
            "skipped": self.skipped,
            "interrupted": self.interrupted,
        }


def run(args: ServerArgs, options: Options, import_seconds: float) -> None:
    """Prints the table; writes the files that `options` name.

    Raises:
        ValueError: a model, device or size that cannot be had.
        RuntimeError: the engine failed.
    """
    with compile_cache(options) as cache:
        found = find_model(args)
        config = found.config
        if found.embeddings is not None or not isinstance(config, ModelConfig):
            raise ValueError("model_path: only models that generate are measured; take another")
        started = time.perf_counter()
        with Engine(server_args=_completed(args, options, config)) as engine:
            start_seconds = time.perf_counter() - started
            info = engine.get_server_info()
            facts = _facts(args, options, engine, info, config)
            facts["start"] = {
                "seconds": start_seconds,
                "import_seconds": import_seconds,
                "phases": dict(info["startup_time"]),
                "cache": cache,
            }
            _measure_all(engine, Report(options, facts), config)


def _measure_all(engine: Engine, found: Report, config: ModelConfig) -> None:
    options = found.options
    try:
        limits = _ceilings(options, engine._started.device)
        found.facts["ceilings"] = limits._asdict() if limits else None
        _show(header(found.facts, options))
        figures = _figures(options, found.facts["model"]["name"])
        if options.times_start:
            start = found.facts["start"]
            row = report.start_row(start["seconds"], start["phases"], figures.get("start"))
            found.add(row)
        model = _costs(engine, config, found.facts)
        for workload in options.workloads:
            _measure(engine, found, workload, model, limits, figures)
        _show(footer(options, engine.get_server_info()["num_compilations_since_start"]))
    except KeyboardInterrupt:
        found.interrupted = True
        print(f"interrupted after {len(found.rows)} rows")
        raise
    finally:
        _write(found)


def _measure(
    engine: Engine,
    found: Report,
    workload: Workload,
    model: Costs | None,
    limits: Ceilings | None,
    figures: Mapping[str, float],
) -> None:
    """Adds the rows of one workload, or the reason why there are none."""
    info = engine.get_server_info()
    reason = obstacle(workload, info)
    if reason is not None:
        found.skipped[workload.name] = reason
        print(f"{workload.name:<24} skipped: {reason}", flush=True)
        return
    vocab_size, repeat = found.facts["model"]["vocab_size"], found.options.repeat
    measured = measure(engine, workload, vocab_size=vocab_size, repeat=repeat)
    floor = None
    if model is not None and limits is not None:
        floor = floors.floor(model, workload, limits, info["max_running_requests"])
    found.add(report.row(measured, floor, figures.get(workload.name)))
    for row in report.usage_rows(measured):
        found.add(row)


def _completed(args: ServerArgs, options: Options, config: ModelConfig) -> ServerArgs:
    """The engine's arguments with what the benchmark sets unless told otherwise."""
    length = min(options.context_length, config.max_position)
    return ServerArgs(
        **dataclasses.asdict(args)
        | {
            "context_length": args.context_length or length,
            "max_running_requests": args.max_running_requests or options.max_running_requests,
        }
    )


def _facts(
    args: ServerArgs, options: Options, engine: Engine, info: dict[str, Any], config: ModelConfig
) -> dict[str, Any]:
    is_cpu = engine._started.device.platform == "cpu"
    is_dummy = args.load_format == "dummy"
    parameters = nnx.state(nnx.eval_shape(lambda: models.build(config)))
    folder = Path(args.model_path).name if args.model_path else "the embedded model"
    sizes = "context_length max_running_requests chunked_prefill_size max_total_num_tokens"
    return {
        "jaxengine": jaxengine.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "machine": machine(engine._started.device),
        "model": {
            "name": shape_name(config) or folder,
            "path": args.model_path,
            "architecture": config.architecture,
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
            "vocab_size": config.vocab_size,
            "dtype": choose_dtype(args, config, is_cpu),
            "weights": "random" if is_dummy else "of the checkpoint",
        },
        "engine": {name: info[name] for name in sizes.split()}
        | {"arguments": _given(engine.server_args), "compiled_steps": info["compiled_steps"]},
        "ceilings": None,
    }


def _given(args: ServerArgs) -> dict[str, Any]:
    """The engine's arguments that are not the default."""
    default = dataclasses.asdict(ServerArgs())
    return {
        name: value for name, value in dataclasses.asdict(args).items() if value != default[name]
    }


def _costs(engine: Engine, config: ModelConfig, facts: Mapping[str, Any]) -> Costs | None:
    """None for a model that the floors do not describe."""
    itemsize = np.dtype(jax.numpy.dtype(facts["model"]["dtype"])).itemsize
    is_cpu = engine._started.device.platform == "cpu"
    model = floors.costs(config, weight_itemsize=itemsize, cache_itemsize=4 if is_cpu else itemsize)
    unknown = facts["model"]["num_params"] - model.num_params
    if 0 <= unknown <= DENSE_TOLERANCE * model.num_params:
        return model
    print("no floors: the model has parameters that a dense decoder has not")
    return None


def _ceilings(options: Options, device: Any) -> Ceilings | None:
    """Those given, else measured; None if there is nothing to compare with them."""
    if not options.workloads:
        return None
    if options.bandwidth is not None and options.flops is not None:
        return Ceilings(options.bandwidth, options.flops)
    measured = ceilings.measure(device)
    return Ceilings(options.bandwidth or measured.bandwidth, options.flops or measured.flops)


def _figures(options: Options, model: str) -> Mapping[str, float]:
    """The reference's, by workload; none for shrunken ones."""
    if options.reference is None or options.scale != 1:
        return {}
    return options.reference.figures(model)


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _write(found: Report) -> None:
    options, content = found.options, found.as_json()
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written: {options.json_path}")
    if options.plot_path is not None and found.rows and content["ceilings"] is not None:
        from jaxengine.bench.plot import draw

        draw(content, options.plot_path)
        print(f"written: {options.plot_path}")
