"""Masks for tests: as ids, followed at random, compared with another reading of a grammar."""

import random
from collections.abc import Callable, Collection, Sequence

import numpy as np

from jaxengine.matcher import Matcher

Reading = Callable[[str], tuple[bool, bool]]
"""Whether a text can go on to match the grammar, and whether it does."""


def mask_of(matcher: Matcher, vocab_size: int) -> list[int]:
    """The ids that the mask of the next token allows, in order."""
    row = np.full(-(-vocab_size // 32), 0x55555555, np.int32)
    matcher.fill(row)
    return allowed(row)


def allowed(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(matcher: Matcher, vocab_size: int, rng: random.Random, max_tokens: int) -> list[int]:
    """Random tokens that the masks allow, until nothing may follow or there are `max_tokens`."""
    ids: list[int] = []
    while not matcher.is_stopped and len(ids) < max_tokens:
        ids.append(rng.choice(mask_of(matcher, vocab_size)))
        matcher.accept(ids[-1])
    assert matcher.error is None
    return ids


def check_masks(
    matcher: Matcher,
    reads: Reading,
    texts: Sequence[str | None],
    eos: Collection[int],
    rng: random.Random,
    text: str = "",
    max_tokens: int = 12,
) -> None:
    """Compares each mask of a random walk after `text` with what `reads` says of each token's text.

    Tokens without a text of their own (None) are left out. Where text is forced, the mask may have
    one of several tokens that begin it.
    """
    vocab_size = len(texts) + 100  # ids that only the model has
    unclear = {i for i, token in enumerate(texts) if token is None}
    for _ in range(max_tokens):
        mask, forced = mask_of(matcher, vocab_size), matcher.forced_tokens()
        can_follow = {i for i, token in enumerate(texts) if token and reads(text + token)[0]}
        if forced:
            assert mask == forced[:1] and mask[0] in can_follow
        else:
            ends = set(eos) if reads(text)[1] else set()
            assert set(mask) - unclear == can_follow | ends, repr(text)
        choices = set(mask) & can_follow
        assert matcher.is_stopped == (not choices)
        if not choices:
            break
        token = rng.choice(sorted(choices))
        matcher.accept(token)
        text += texts[token] or ""
    assert matcher.error is None
