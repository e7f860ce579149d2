"""Rows: a figure beside its floor and its reference, as a line of a table and as JSON. It measures
nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxengine.bench.floors import Floor
from jaxengine.bench.measure import Measured

FORMAT = "{:<24} {:>10}  {:<13} {:>10} {:>8} {:>10} {:>7} {:>7}"
LEGEND = """\
floor      what the ceilings allow at best for the bytes and operations that the workload needs
of floor   share of that limit which was reached; above 100 % the ceilings are too low
vs it      speed as a multiple of the reference's; above 1 is faster
spread     (largest - smallest) / median of the repetitions
gpu busy   share of the call's wall time in which the device had a step in flight
host       what the engine's thread works for each step; waiting for tokens does not count
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    workload: str
    unit: str
    value: float  # the median
    higher_is_better: bool
    samples: tuple[float, ...] = ()
    floor: float | None = None  # in the same unit
    of_floor: float | None = None  # share of the limit reached
    reference: float | None = None
    speedup: float | None = None  # over the reference
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> float | None:
        if len(self.samples) < 2:
            return None
        return (max(self.samples) - min(self.samples)) / self.value


def row(measured: Measured, floor: Floor | None, reference: float | None) -> Row:
    workload, seconds = measured.workload, measured.median
    value = workload.value(seconds)
    return Row(
        workload=workload.name,
        unit=workload.unit,
        value=value,
        higher_is_better=workload.higher_is_better,
        samples=tuple(map(workload.value, measured.seconds)),
        floor=None if floor is None else workload.value(floor.seconds),
        of_floor=None if floor is None else floor.seconds / seconds,
        reference=reference,
        speedup=speedup(value, reference, workload.higher_is_better),
        details=_details(measured, floor),
    )


def usage_rows(measured: Measured) -> Iterator[Row]:
    """Of a job: how busy the device was, and what a step cost the host."""
    if measured.usage is None or measured.busy_share is None or measured.host_seconds is None:
        return
    name = measured.workload.name
    yield Row(
        workload=f"{name} gpu busy",
        unit="%",
        value=measured.busy_share * 100,
        higher_is_better=True,
    )
    yield Row(
        workload=f"{name} host",
        unit="us per step",
        value=measured.host_seconds * 1e6,
        higher_is_better=False,
        details={"launches": measured.usage.num_launches, "steps": measured.usage.num_steps},
    )


def start_row(seconds: float, phases: Mapping[str, float], reference: float | None) -> Row:
    return Row(
        workload="start",
        unit="s",
        value=seconds,
        higher_is_better=False,
        samples=(seconds,),
        reference=reference,
        speedup=speedup(seconds, reference, higher_is_better=False),
        details={"phases": dict(phases)},
    )


def speedup(value: float, reference: float | None, higher_is_better: bool) -> float | None:
    if reference is None:
        return None
    return value / reference if higher_is_better else reference / value


def heading() -> str:
    return FORMAT.format(
        "workload", "value", "unit", "floor", "of floor", "reference", "vs it", "spread"
    )


def line(row: Row, scale: float = 1.0) -> str:
    """A line of the table; `scale` marks what is not the real workload."""
    percent = lambda share: "-" if share is None else f"{share:.0%}"
    return FORMAT.format(
        row.workload if scale == 1 else f"{row.workload} x{scale:g}",
        number(row.value),
        row.unit,
        number(row.floor),
        percent(row.of_floor),
        number(row.reference),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        percent(row.spread),
    ).rstrip()


def number(value: float | None) -> str:
    """Four digits that count, and thousands set apart."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def as_json(row: Row) -> dict[str, Any]:
    return asdict(row)


def _details(measured: Measured, floor: Floor | None) -> dict[str, Any]:
    workload = measured.workload
    found: dict[str, Any] = {
        "kind": workload.kind,
        "requests": workload.num_rows,
        "prompt_tokens": sum(workload.prompt_lens),
        "output_tokens": sum(workload.output_lens),
        "seconds": measured.median,  # of a call, or of one step
    }
    if floor is not None:  # what was moved and computed, if nothing was in vain
        found |= {
            "floor_seconds": floor.seconds,
            "num_bytes": floor.work.num_bytes,
            "num_flops": floor.work.num_flops,
            "bytes_per_second": floor.work.num_bytes / measured.median,
            "flops_per_second": floor.work.num_flops / measured.median,
        }
    return found
