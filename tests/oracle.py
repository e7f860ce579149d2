"""transformers' models on PyTorch: what other numbers are compared with. A test that asks for one
is skipped where PyTorch is not installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Outputs = Callable[..., Any]
"""(ids, **what transformers is asked for) -> its output for one sequence, with a leading 1."""


def causal_model(folder: str | Path) -> Any:
    """The float32 model itself."""
    torch = pytest.importorskip("torch", reason="transformers' models are the oracle")
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def causal_outputs(folder: str | Path) -> Outputs:
    """What it gives without gradients."""
    model = causal_model(folder)
    import torch

    def outputs_of(ids: list[int], **asked: Any) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids]), **asked)

    return outputs_of
