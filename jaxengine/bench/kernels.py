"""`python -m jaxengine.bench.kernels`: every kernel at its production sizes, beside its floor and
what else computes the same. Its rows are the `Case`s of `kernel_cases.py`."""

import argparse
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxengine import pallas_kernels
from jaxengine.bench import ceilings
from jaxengine.bench.case import Case
from jaxengine.bench.floors import Ceilings
from jaxengine.bench.kernel_cases import MAKERS, cases
from jaxengine.bench.machine import machine, summary
from jaxengine.bench.options import add_ceilings, read_ceilings, target
from jaxengine.bench.report import number
from jaxengine.bench.timing import num_sets, seconds_per_call
from jaxengine.config import configure_jax

FAILURE, USER_ERROR, INTERRUPTED = 1, 2, 130
MEMORY = 8 << 30  # bytes of arguments at most, of all sets together
FORMAT = "{:<50} {:<7} {:>9} {:>7} {:>9} {:>8}"

DESCRIPTION = """\
Times each kernel of jaxengine.pallas_kernels on the GPU at the sizes of its SHAPES, and the plain
XLA computation of the same beside it. Arguments are random, distinct from call to call, and
together larger than the cache. `of floor` is the share reached of what the ceilings allow.
"""


@dataclass(frozen=True, kw_only=True)
class Timing:
    kernel: str
    shape: str
    variant: str
    seconds: float | None  # of a call; None if it failed
    floor_seconds: float
    num_bytes: float
    num_flops: float
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    try:
        args = _parser().parse_args(arguments)
        found = list(_chosen(args.only, args.shapes))
        if args.list:
            for case in found:
                print(f"{case.kernel}: {case.shape} ({', '.join(case.variants)})")
            return 0
        return _run(found, args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        print(f"jaxengine.bench.kernels: error: {error}", file=sys.stderr)
        return USER_ERROR


def _run(found: Sequence[Case], args: argparse.Namespace) -> int:
    path, given = target("--json", args.json), read_ceilings(args)
    configure_jax()
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(
            f"kernels run on an NVIDIA GPU, and JAX has {device.device_kind} only; see "
            "--list for what would be timed"
        )
    facts = machine(device)
    print(summary(facts), flush=True)
    limits = _ceilings(given, device)
    print(f"ceilings: {limits.bandwidth / 1e12:.3g} TB/s, {limits.flops / 1e12:.4g} TFLOP/s")
    print(FORMAT.format("kernel and shape", "", "us", "TB/s", "TFLOP/s", "of floor"), flush=True)
    timings: list[Timing] = []
    try:
        for case in found:
            for timing in time_case(case, limits):
                timings.append(timing)
                print(line(timing), flush=True)
    finally:  # after Ctrl-C, too
        if path is not None:
            _write(path, facts, limits, timings)
    return FAILURE if any(timing.error for timing in timings) else 0


def time_case(case: Case, limits: Ceilings) -> Iterator[Timing]:
    """Each variant of a case; one that fails says why, and the others go on."""
    for variant, function in case.variants.items():
        known: dict[str, Any] = dict(kernel=case.kernel, shape=case.shape, variant=variant)
        known |= dict(floor_seconds=case.work.seconds(limits), **case.work._asdict())
        try:
            count = min(num_sets(case.work.num_bytes), int(MEMORY // case.work.num_bytes) or 1)
            keys = jax.random.split(jax.random.key(0), count)
            make = jax.jit(case.make)
            sets = [make(key) for key in keys]
            seconds = seconds_per_call(function, sets, in_place=case.in_place)
        except Exception as error:  # whatever a kernel can go wrong with
            reason = next(iter(str(error).splitlines()), "")
            yield Timing(**known, seconds=None, error=f"{type(error).__name__}: {reason}")
        else:
            yield Timing(**known, seconds=seconds)


def line(timing: Timing) -> str:
    title = f"{timing.kernel}: {timing.shape}" if timing.variant == "kernel" else ""
    if timing.seconds is None:
        return f"{title:<50} {timing.variant:<7} failed: {timing.error}"
    return FORMAT.format(
        title,
        timing.variant,
        number(timing.seconds * 1e6),
        f"{timing.num_bytes / timing.seconds / 1e12:.2f}",
        f"{timing.num_flops / timing.seconds / 1e12:.1f}",
        f"{timing.floor_seconds / timing.seconds:.0%}",
    )


def _chosen(only: str | None, shapes: str) -> Iterator[Case]:
    """The cases whose kernel is listed in `only` and whose shape contains `shapes`."""
    modules = dict(_modules())
    wanted = list(modules) if only is None else [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in modules:
            raise ValueError(f"--only: expected some of {', '.join(modules)}, got {name!r}")
        if name not in MAKERS:
            print(f"{name}: left out, as kernel_cases.py has no cases for it", file=sys.stderr)
        yield from (case for case in cases(name, modules[name]) if shapes in case.shape)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """Every kernel: the modules that have `SHAPES`."""
    for info in pkgutil.iter_modules(pallas_kernels.__path__):
        module = import_module(f"{pallas_kernels.__name__}.{info.name}")
        if hasattr(module, "SHAPES"):
            yield info.name, module


def _ceilings(given: tuple[float | None, float | None], device: Any) -> Ceilings:
    bandwidth, flops = given
    if bandwidth is None or flops is None:
        measured = ceilings.measure(device)
        return Ceilings(bandwidth or measured.bandwidth, flops or measured.flops)
    return Ceilings(bandwidth, flops)


def _write(path: Path, facts: Any, limits: Ceilings, timings: Sequence[Timing]) -> None:
    content = {
        "machine": facts,
        "ceilings": limits._asdict(),
        "timings": [vars(timing) for timing in timings],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxengine.bench.kernels", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("--only", metavar="A,B", help="these kernels, by the names of their files")
    parser.add_argument("--shapes", metavar="TEXT", default="", help="shapes whose name has TEXT")
    parser.add_argument("--list", action="store_true", help="show what there is; time nothing")
    parser.add_argument("--json", metavar="FILE", help="write the times to this file, too")
    add_ceilings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
