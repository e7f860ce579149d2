"""From logits to a token: pure functions compiled into the step, one program for any mix of rows.
They know neither requests nor the step that calls them."""

from jaxengine.sampling.adjust import adjust
from jaxengine.sampling.probabilities import TokenLogprobs, logprobs, logprobs_by_blocks
from jaxengine.sampling.sample import draw_adjusted, sample
from jaxengine.sampling.state import SamplingState, empty_state, install, pack

__all__ = [
    "SamplingState",
    "TokenLogprobs",
    "adjust",
    "draw_adjusted",
    "empty_state",
    "install",
    "logprobs",
    "logprobs_by_blocks",
    "pack",
    "sample",
]
