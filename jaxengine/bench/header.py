"""The lines above and below the table: what was measured, where, and how to read it."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxengine.bench.machine import summary
from jaxengine.bench.options import Options
from jaxengine.bench.reference import Reference
from jaxengine.bench.report import LEGEND, heading, number

Facts = Mapping[str, Any]


def header(facts: Facts, options: Options) -> Iterator[str]:
    yield f"jaxengine {facts['jaxengine']}: benchmark"
    for name, text in _described(facts, options).items():
        yield f"  {name:<10} {text}"
    if options.scale != 1:
        yield f"SMOKE TEST: all sizes times {options.scale:g}; compare these figures with nothing"
    yield heading()


def footer(options: Options, num_compilations: int) -> Iterator[str]:
    yield f"\n{LEGEND}"
    if num_compilations:
        yield f"warning: {num_compilations} programs were compiled while measuring"
    if options.scale != 1:
        yield f"SMOKE TEST: all sizes times {options.scale:g}"


def _described(facts: Facts, options: Options) -> dict[str, str]:
    model, engine, start = facts["model"], facts["engine"], facts["start"]
    parts = ((name, seconds) for name, seconds in start["phases"].items() if name != "total")
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts)
    size, unit = (1e9, "B") if model["num_params"] >= 1e8 else (1e6, "M")
    count = f"{number(model['num_params'] / size)} {unit}"
    lines = {
        "model": f"{model['name']}, {count} parameters, {model['dtype']}, {model['weights']}",
        "machine": summary(facts["machine"]),
        "engine": f"context {engine['context_length']}, {engine['max_running_requests']} running "
        f"requests, {engine['chunked_prefill_size']} tokens a step, KV cache "
        f"{engine['max_total_num_tokens']:,}",
        "start": f"{start['seconds']:.1f} s ({phases}); imports {start['import_seconds']:.1f} s",
        "cache": f"{start['cache']['folder'] or 'none'}; files before the start: "
        f"{start['cache']['files_before']}",
    }
    if facts["ceilings"] is not None:
        lines["ceilings"] = _ceilings(facts["ceilings"], options)
    if options.reference is not None:
        lines["reference"] = _reference(options.reference, facts, options)
    return lines


def _ceilings(found: Mapping[str, float], options: Options) -> str:
    source = lambda given: "measured now" if given is None else "given"
    return (
        f"{found['bandwidth'] / 1e12:.3g} TB/s read ({source(options.bandwidth)}), "
        f"{found['flops'] / 1e12:.4g} TFLOP/s ({source(options.flops)})"
    )


def _reference(reference: Reference, facts: Facts, options: Options) -> str:
    text = f"{reference.engine} on {reference.gpu}"
    if options.scale != 1:
        return f"{text}: not compared with, at this scale"
    if not reference.figures(facts["model"]["name"]):
        return f"{text}: has no figures for this model"
    if reference.gpu != facts["machine"]["device"]:
        text += f", which is not this device ({facts['machine']['device']})"
    indent = "\n" + " " * 13
    return indent.join([text, *reference.notes])
