"""Beam search: the likeliest continuations as a whole, instead of the likeliest token each time.

Each step asks for more than b of the likeliest next tokens of all b beams in one call, so many that
b of them do not end, and keeps the b best that go on. The score of a beam is

    log p(tokens) / number of tokens ^ length_penalty

with a length_penalty of at least 0. A beam whose last token is a stop token is finished. The search
ends once b are and none that still runs could come to a better score. Of what was computed before,
the prefix cache has all full pages, so a step computes a page of tokens a beam at most.

Source: the algorithm as in Wu et al. 2016, "Google's Neural Machine Translation System",
arXiv:1609.08144, section 7, with the plain power of the length; that of transformers with
`early_stopping="never"`.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from jaxengine import Engine


class Beam(NamedTuple):
    tokens: tuple[int, ...]  # behind the prompt, with the stop token
    logprob: float  # of all of them

    def score(self, length_penalty: float) -> float:
        return self.logprob / len(self.tokens) ** length_penalty


def beam_search(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
    length_penalty: float = 1.0,
) -> list[Beam]:
    """The best `num_beams` continuations, the best first."""
    score = lambda beam: beam.score(length_penalty)
    num_candidates = num_beams * (1 + max(1, len(stop_token_ids)))
    running, finished = [Beam((), 0.0)], list[Beam]()
    for num_tokens in range(1, max_new_tokens + 1):
        longer = extended(engine, prompt_ids, running, num_candidates)
        running = []
        for rank, beam in enumerate(longer):
            is_finished = beam.tokens[-1] in stop_token_ids or num_tokens == max_new_tokens
            if not is_finished:
                running.append(beam)
            elif rank < num_beams:
                finished.append(beam)
        running = running[:num_beams]
        finished = sorted(finished, key=score, reverse=True)[:num_beams]
        best_logprob = max((beam.logprob for beam in running), default=-math.inf)
        attainable = best_logprob / max_new_tokens**length_penalty
        if len(finished) == num_beams and attainable <= score(finished[-1]):
            break
    return finished


def extended(
    engine: Engine, prompt_ids: Sequence[int], beams: Sequence[Beam], count: int
) -> list[Beam]:
    """The `count` likeliest beams with one token more, the likeliest first."""
    results = engine.generate(
        input_ids=[[*prompt_ids, *beam.tokens] for beam in beams],
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        top_logprobs_num=count,
    )
    longer = [
        Beam((*beam.tokens, token), beam.logprob + logprob)
        for beam, result in zip(beams, results, strict=True)
        for logprob, token, _ in result["meta_info"]["output_top_logprobs"][0]
    ]
    return sorted(longer, key=lambda beam: beam.logprob, reverse=True)[:count]
