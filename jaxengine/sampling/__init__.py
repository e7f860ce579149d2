"""From logits to a token: pure functions compiled into the step, one program for any mix of rows.
They know neither requests nor the step that calls them."""

from jaxengine.sampling.adjust import adjust
from jaxengine.sampling.masks import allow_only
from jaxengine.sampling.probabilities import (
    logprobs,
    logprobs_by_blocks,
    logprobs_of_some,
)
from jaxengine.sampling.sample import sample
from jaxengine.sampling.state import (
    SamplingState,
    empty_state,
    install,
    num_fields,
    of_request,
    pack,
)

__all__ = [
    "SamplingState",
    "adjust",
    "allow_only",
    "empty_state",
    "install",
    "logprobs",
    "logprobs_by_blocks",
    "logprobs_of_some",
    "num_fields",
    "of_request",
    "pack",
    "sample",
]
