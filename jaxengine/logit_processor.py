"""Logit processors in NumPy, as SGLang's users write them: called by the host between the model and
the draw. A step that has any cannot be prepared while the one before it runs on; a registered JAX
function (`jaxengine.LogitsProcessor`) costs next to nothing instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, NoReturn

import numpy as np


@dataclass(frozen=True)
class RequestView:
    """What a processor may know of the request that its row is of."""

    rid: str
    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]


class CustomLogitProcessor(ABC):
    """Changes the logits of the requests it is passed with, as
    `generate(..., custom_logit_processor=...)`: all those of one step that have the same object, in
    one call."""

    @abstractmethod
    def __call__(
        self, logits: np.ndarray, custom_param_list: list[dict[str, Any] | None]
    ) -> np.ndarray:
        """Logits `[rows, V]` float32 after penalties, grammar and biases, to be returned or changed
        in place; and the `custom_params` of each row, in which `"__req__"` is the `RequestView`."""

    @classmethod
    def to_str(cls) -> NoReturn:
        raise NotImplementedError(
            "to_str: a string would have to be code to be run, and no code is taken from strings; "
            f"pass an object, custom_logit_processor={cls.__name__}()"
        )


def processors_of(given: Any, count: int) -> list[CustomLogitProcessor | None]:
    """For each of `count` prompts, of one for all or a list of one each."""
    processors = list(given) if isinstance(given, list | tuple) else [given] * count
    for each in processors:
        if each is not None and not isinstance(each, CustomLogitProcessor):
            raise ValueError(
                f"custom_logit_processor: expected a CustomLogitProcessor, got {short(each)}; no "
                "code is taken from strings, and registered functions are chosen by "
                "sampling_params={'logits_processors': ...}"
            )
    if len(processors) != count:
        raise ValueError(f"custom_logit_processor: expected one, or {count}, got {len(processors)}")
    return processors


def process(
    processor: CustomLogitProcessor,
    logits: np.ndarray,
    params: Sequence[Mapping[str, Any] | None],
    views: Sequence[RequestView],
) -> np.ndarray:
    """What the processor makes of logits `[rows, V]`.

    Raises:
        ValueError: it returned another shape.
        Exception: whatever it raises.
    """
    given: list[dict[str, Any] | None] = [
        dict(each or {}) | {"__req__": v} for each, v in zip(params, views, strict=True)
    ]
    made = processor(logits, given)
    made = np.asarray(logits if made is None else made, np.float32)
    if made.shape != logits.shape:
        raise ValueError(f"{type(processor).__name__} returned {made.shape} for {logits.shape}")
    return made
