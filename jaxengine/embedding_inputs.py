"""From the arguments of `encode` and `rerank` to prompts, or an error that names the argument. It
knows lists and texts, not what reads them."""

from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

from jaxengine.inputs import Inputs, normalise
from jaxengine.pooling import Embeddings
from jaxengine.sampling_params import SamplingParams

NOTHING_NEW = SamplingParams(max_new_tokens=0)
AVAILABLE = ("prompt", "dimensions", "rid")


def texts_or_ids(prompt: Any, rid: Any) -> Inputs:
    """An entry for each text, or for each list of token ids.

    Raises:
        ValueError: something else, or names that do not fit.
    """
    is_list = isinstance(prompt, list | tuple)
    if isinstance(prompt, str) or (is_list and (not prompt or isinstance(prompt[0], str))):
        return normalise(prompt, NOTHING_NEW, None, rid=rid, defaults={})
    return normalise(None, NOTHING_NEW, prompt, rid=rid, defaults={})


def pairs_of(prompt: Any) -> list[tuple[str, str]]:
    """Pairs of texts, as they are given to `rerank`."""
    pairs = prompt if isinstance(prompt, list | tuple) else [prompt]
    for pair in pairs:
        if not _is_pair(pair):
            raise ValueError(
                "prompt: expected a list of pairs of texts, [[query, document], ...], got "
                f"{short(pair)}"
            )
    return [(query, document) for query, document in pairs]


def check_dimensions(dimensions: Any, embeddings: Embeddings) -> None:
    """Raises ValueError where embeddings cannot be cut to so many."""
    if dimensions is None:
        return
    allowed: Sequence[int] = embeddings.dimensions
    if type(dimensions) is not int or dimensions < 1:
        raise ValueError(f"dimensions: expected a positive integer, got {short(dimensions)}")
    if not allowed:
        raise ValueError(
            f"dimensions: expected none, got {dimensions}: nothing says that embeddings of this "
            "model may be cut; if it was trained for it, pass "
            "json_model_override_args='{\"is_matryoshka\": true}'"
        )
    if dimensions not in allowed:
        known = f"1 to {embeddings.size}" if isinstance(allowed, range) else sorted(allowed)
        raise ValueError(f"dimensions: expected one of {known}, got {dimensions}")


def _is_pair(pair: Any) -> bool:
    is_two = isinstance(pair, list | tuple) and len(pair) == 2
    return is_two and all(isinstance(text, str) for text in pair)
