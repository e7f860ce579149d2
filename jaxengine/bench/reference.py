"""Figures of another engine, or of an earlier run, to compare with. It knows no devices."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxengine.models.config import ModelConfig
from jaxengine.models.shapes import SHAPES

SHIPPED = "reference_h200.json"
FORM = (
    "expected what --json writes, or an object with engine, gpu and models, which maps a model's "
    "name to figures by workload"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    engine: str
    gpu: str
    notes: tuple[str, ...]
    models: Mapping[str, Mapping[str, float]]  # model -> workload -> figure

    def figures(self, model: str) -> Mapping[str, float]:
        """Those of a model; none where it is not among them."""
        return self.models.get(model, {})


def load(name: str) -> Reference:
    """A reference by the name of a shipped one, or from a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    shipped = json.loads(files("jaxengine.bench").joinpath(SHIPPED).read_text(encoding="utf-8"))
    if name in shipped:
        return _read(shipped[name])
    if not Path(name).is_file():
        raise ValueError(
            f"--reference: expected {', '.join(shipped)} or a file, and {name!r} is neither"
        )
    try:
        return _read(json.loads(Path(name).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--reference: {name}: {FORM} ({error!r})") from None


def shape_name(config: ModelConfig) -> str | None:
    """The built-in shape that a model has, whatever it is called and wherever it lies."""
    for name, attributes in SHAPES.items():
        if _sizes(ModelConfig.from_dict(attributes)) == _sizes(config):
            return name
    return None


def _read(content: Any) -> Reference:
    if "rows" in content:  # a report of ours
        if content["scale"] != 1:
            raise ValueError("it was measured with --scale")
        rows = {row["workload"]: float(row["value"]) for row in content["rows"]}
        version, device = content["jaxengine"], content["machine"]["device"]
        return Reference(
            engine=f"jaxengine {version}",
            gpu=device,
            notes=(f"measured {content['date']} with: {content['command']}",),
            models={content["model"]["name"]: rows},
        )
    models = {
        model: {workload: float(value) for workload, value in figures.items()}
        for model, figures in content["models"].items()
    }
    notes = (f"measured {content['measured']}",) if "measured" in content else ()
    notes += tuple(content.get("notes", ()))
    return Reference(engine=content["engine"], gpu=content["gpu"], notes=notes, models=models)


def _sizes(config: ModelConfig) -> tuple[Any, ...]:
    return (
        config.architecture,
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
    )
