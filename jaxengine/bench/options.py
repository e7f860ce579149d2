"""The options of the command, checked before anything slow begins. It imports no jax."""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.bench.reference import Reference, load
from jaxengine.bench.workloads import DEFAULT, HELP, Workload, find
from jaxengine.models.shapes import SHAPES

DESCRIPTION = """\
Measures the engine end to end and prints each figure beside the limit of the device and, if
wanted, beside those of another engine. Without --model or --shape it is the small embedded model.
Unless set otherwise the engine has a context of 8192 tokens (or the model's, if that is shorter),
256 running requests and 0.9 of the memory for weights and KV cache.
"""

EPILOG = (
    HELP
    + """
examples:
  jaxengine bench --shape qwen3-0.6b --reference vllm --json 0.6b.json --plot 0.6b.png
  jaxengine bench --shape llama-3.1-8b --workloads single,step-1,step-32,step-128,step-256
  jaxengine bench --model FOLDER --workloads nano --repeat 3 --reference earlier.json
  jaxengine bench --scale 0.02 --device cpu        # does it run at all?
  python -m jaxengine.bench.kernels --help         # the kernels, one by one
"""
)

CONTEXT_LENGTH, MAX_RUNNING_REQUESTS = 8192, 512
ENGINE: dict[str, Any] = {
    "load_format": None,  # dummy for a shape
    "mem_fraction_static": 0.9,
    "skip_tokenizer_init": True,
    "random_seed": 0,
}
"""Defaults of the engine's options that differ here: those of the published comparison."""


@dataclass(frozen=True, kw_only=True)
class Options:
    workloads: tuple[Workload, ...]
    times_start: bool
    repeat: int
    scale: float
    reference: Reference | None
    bandwidth: float | None  # bytes a second
    flops: float | None  # operations a second
    cache_dir: Path | None
    has_fresh_cache: bool
    json_path: Path | None
    plot_path: Path | None
    command: str

    @property
    def context_length(self) -> int:
        return max(2, round(CONTEXT_LENGTH * self.scale))

    @property
    def max_running_requests(self) -> int:
        return max(1, round(MAX_RUNNING_REQUESTS * self.scale))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark alone; those of the engine are added after them."""
    parser.epilog = EPILOG
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--workloads", metavar="A,B", default=",".join(DEFAULT), help="default: all below")
    add("--shape", metavar="NAME", help=f"random weights of: {', '.join(SHAPES)}")
    add("--repeat", type=int, default=1, metavar="N", help="times each; the median is shown")
    add("--reference", metavar="R", help="vllm or sglang (on an H200), or a file of --json")
    add("--json", metavar="FILE", help="write everything to this file, too")
    add("--plot", metavar="FILE", help="draw it; needs the extra `bench`")
    add("--scale", type=float, default=1.0, metavar="S", help="below 1: shrink all, to try it out")
    add_ceilings(group)
    add("--cache-dir", metavar="DIR", help="compiled programs are kept here")
    add("--fresh-cache", action="store_true", help="begin with none, and keep none")


def add_ceilings(group: Any) -> None:
    about = "of the device, for the floors; default: measured"
    group.add_argument("--bandwidth", type=float, metavar="TB/S", help=f"read bandwidth {about}")
    group.add_argument("--flops", type=float, metavar="TFLOP/S", help=f"product rate {about}")


def read(args: argparse.Namespace) -> Options:
    """Checks the options; sets those of the engine that follow from them in `args`.

    Raises:
        ValueError: what an option says cannot be had, with the way out.
    """
    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale: expected a number above 0 and at most 1, got {args.scale:g}")
    if args.repeat < 1:
        raise ValueError(f"--repeat: expected at least 1, got {args.repeat}")
    if args.fresh_cache and args.cache_dir is not None:
        raise ValueError("--fresh-cache and --cache-dir: give one of them")
    _choose_model(args)
    workloads, times_start = find(args.workloads, args.scale)
    for workload in workloads:
        if workload.needs_text:
            _ask_for_text(args, workload.name)
    bandwidth, flops = read_ceilings(args)
    return Options(
        workloads=tuple(workloads),
        times_start=times_start,
        repeat=args.repeat,
        scale=args.scale,
        reference=None if args.reference is None else load(args.reference),
        bandwidth=bandwidth,
        flops=flops,
        cache_dir=None if args.cache_dir is None else Path(args.cache_dir).expanduser().absolute(),
        has_fresh_cache=args.fresh_cache,
        json_path=target("--json", args.json),
        plot_path=_plot_path(args.plot),
        command=args.command,
    )


def read_ceilings(args: argparse.Namespace) -> tuple[float | None, float | None]:
    """The two ceilings in bytes and operations a second."""
    found: list[float | None] = []
    for option, value in (("--bandwidth", args.bandwidth), ("--flops", args.flops)):
        if value is not None and not value > 0:
            raise ValueError(f"{option}: expected a number above 0, got {value:g}")
        found.append(None if value is None else value * 1e12)
    return found[0], found[1]


def target(option: str, path: str | None) -> Path | None:
    """A file that can be written at the end, as far as can be told now."""
    if path is None:
        return None
    found = Path(path).expanduser()
    if not found.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {found.parent}; make it, or choose another")
    if found.is_dir():
        raise ValueError(f"{option}: {found} is a folder; expected a file in it")
    return found


def _choose_model(args: argparse.Namespace) -> None:
    if args.shape is None:
        return
    if args.model_path is not None:
        raise ValueError("--shape and --model: give one of them")
    if args.shape not in SHAPES:
        raise ValueError(f"--shape: expected one of {', '.join(SHAPES)}, got {args.shape!r}")
    if args.load_format not in (None, "dummy"):
        raise ValueError("--load-format: a shape has no files; use --model FOLDER, or dummy")
    args.model_path, args.load_format = args.shape, "dummy"


def _ask_for_text(args: argparse.Namespace, workload: str) -> None:
    if args.shape is not None and args.tokenizer_path is None:
        raise ValueError(
            f"--workloads: {workload} needs a tokenizer, and a shape has none; name one with "
            "--tokenizer-path"
        )
    args.skip_tokenizer_init = False


def _plot_path(path: str | None) -> Path | None:
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: needs matplotlib, which is not installed; pip install matplotlib, or "
            "jaxengine with its extra `bench`"
        )
    found = target("--plot", path)
    if found is not None and found.suffix.lower() not in PLOT_FORMATS:
        raise ValueError(f"--plot: expected a name that ends in {' or '.join(PLOT_FORMATS)}")
    return found


PLOT_FORMATS: Sequence[str] = (".png", ".svg", ".pdf")
