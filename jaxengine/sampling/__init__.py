"""From logits to a token: pure functions compiled into the step, one program for any mix of rows.
They know neither requests nor the step that calls them."""

from jaxengine.sampling.probabilities import logprobs, logprobs_by_blocks
from jaxengine.sampling.sample import sample
from jaxengine.sampling.state import SamplingState, empty_state, install, pack

__all__ = [
    "SamplingState",
    "empty_state",
    "install",
    "logprobs",
    "logprobs_by_blocks",
    "pack",
    "sample",
]
