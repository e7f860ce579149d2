"""Best of n: several samples, ranked by what the model itself thinks of them.

The score of a sample is the mean log-probability of its tokens; a sum would prefer short texts. It
is of the distribution that they were drawn from, unless the engine has
`logprobs_mode="raw_logprobs"`: then of the model's own, whatever the temperature.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxengine import Engine


def best_of_n(
    engine: Engine, prompt: str, n: int, sampling_params: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The results of `n` samples, the best first."""
    results = engine.generate([prompt], {**sampling_params, "n": n}, return_logprob=True)
    return sorted(results, key=mean_logprob, reverse=True)


def mean_logprob(result: Mapping[str, Any]) -> float:
    entries = result["meta_info"]["output_token_logprobs"]
    return float(np.mean([logprob for logprob, _, _ in entries]))
