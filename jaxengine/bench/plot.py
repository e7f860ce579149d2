"""A report as a picture: how close each workload comes to the roof of bandwidth and arithmetic, and
throughput over batch size. It needs matplotlib (the extra `bench`) and no device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
Axes = Any  # of matplotlib, which may be missing until `draw` is called


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws what `--json` writes; the kind of file follows from its name."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    placed = [row for row in report["rows"] if "num_flops" in row["details"]]
    steps = [row for row in placed if row["workload"].startswith("step-")]
    has_batches = len(steps) > 1
    figure = Figure(figsize=(13 if has_batches else 7.5, 7), layout="constrained")
    axes = figure.subplots(1, 2 if has_batches else 1, squeeze=False)[0]
    _roofline(axes[0], placed, report["ceilings"])
    if has_batches:
        _batches(axes[1], steps, report["reference"])
    figure.suptitle(_title(report))
    figure.savefig(path, dpi=150)


def _roofline(axes: Axes, rows: Rows, ceilings: Mapping[str, float]) -> None:
    bandwidth, flops = ceilings["bandwidth"], ceilings["flops"]
    intensities = [row["details"]["num_flops"] / row["details"]["num_bytes"] for row in rows]
    ridge = flops / bandwidth
    span = np.geomspace(min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3, 200)
    roof = np.minimum(span * bandwidth, flops) / 1e12
    label = f"ceilings: {bandwidth / 1e12:.3g} TB/s, {flops / 1e12:.3g} TFLOP/s"
    axes.loglog(span, roof, color="black", label=label)
    for row, intensity in zip(rows, intensities, strict=True):
        details = row["details"]
        achieved = details["flops_per_second"] / 1e12
        text = (
            f"{row['workload']}: {row['of_floor']:.0%}\n"
            f"{details['bytes_per_second'] / 1e12:.3g} TB/s, {achieved:.3g} TFLOP/s"
        )
        (point,) = axes.plot(intensity, achieved, "o")
        # The way up to the roof; a job's floor is a sum of steps and lies a little below it.
        limit = details["num_flops"] / details["floor_seconds"] / 1e12
        axes.plot([intensity] * 2, [achieved, limit], ":", color=point.get_color())
        point.set_label(text)
    axes.set_xlabel("operations per byte [FLOP/B]")
    axes.set_ylabel("needed operations per second [TFLOP/s]")
    axes.set_title("Roofline: share of the floor's speed reached")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    axes.grid(which="both", alpha=0.2)


def _batches(axes: Axes, rows: Rows, reference: Mapping[str, str] | None) -> None:
    rows = sorted(rows, key=lambda row: row["details"]["requests"])
    _line(axes, rows, "floor", "limit", "--", "black")
    _line(axes, rows, "value", "jaxengine", "o-", "tab:blue")
    compared = [row for row in rows if row["reference"] is not None]
    if reference is not None and compared:
        _line(axes, compared, "reference", reference["engine"], "s-", "tab:orange")
    axes.set_xscale("log", base=2)
    batches = [row["details"]["requests"] for row in rows]
    axes.set_xticks(batches, labels=[f"{batch}" for batch in batches])
    axes.set_yscale("log")
    axes.set_xlabel("sequences in the batch")
    axes.set_ylabel("output tokens per second [1/s]")
    axes.set_title("Decode throughput over batch size (step-B)")
    axes.legend()
    axes.grid(which="both", alpha=0.2)


def _line(axes: Axes, rows: Rows, field: str, label: str, style: str, color: str) -> None:
    """Tokens a second from milliseconds a step."""
    batches = [row["details"]["requests"] for row in rows]
    rates = [row["details"]["requests"] * 1e3 / row[field] for row in rows]
    axes.plot(batches, rates, style, label=label, color=color)


def _title(report: Mapping[str, Any]) -> str:
    model, machine = report["model"], report["machine"]
    title = f"{model['name']} ({model['dtype']}) on {machine['device']}, {report['date'][:10]}"
    return title if report["scale"] == 1 else f"{title} - SMOKE TEST at scale {report['scale']:g}"
