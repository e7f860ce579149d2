"""Which tokens may come next in a completion, by llguidance. It knows token ids and masks, neither
arrays on a device nor requests.

A mask has a bit for each token of the model: token i is bit i % 32 of word i // 32, and allowed if
that is set.
"""

import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import llguidance
import numpy as np

from jaxengine.ebnf import parse_ebnf
from jaxengine.json_schemas import parse_schema, with_options
from jaxengine.lark import lark_grammar
from jaxengine.sampling_params import GrammarSpec
from jaxengine.structural_tags import SpecialTokens, structural_tag_grammar
from jaxengine.tokenizer import Tokenizer

LIMITS = llguidance.LLParserLimits(
    max_grammar_size=20_000,  # symbols; the worst grammar of that size takes two seconds for a mask
    max_lexer_states=50_000,  # of one or two kilobytes
    verbose_errors=False,
)

NUM_LEXERS = 8  # of a grammar, twice as many as threads that fill masks: they take turns
LEXER_SECONDS = 0.1  # that making more than one may take


class Matcher:
    """Follows one completion. A token that does not fit and a limit that is hit end in `error`."""

    def __init__(self, inner: llguidance.LLMatcher, lexer: int = 0):
        self.inner = inner
        self.lexer = lexer  # which one of its grammar; it serves one matcher at a time

    def clone(self) -> "Matcher":
        """Another one at the same place, with the same lexer; takes microseconds."""
        return Matcher(self.inner.deep_copy(), self.lexer)

    def accept(self, token: int) -> None:
        """Go on by one token, which the mask allowed."""
        self.inner.consume_token(token)

    @property
    def is_stopped(self) -> bool:
        """Nothing may follow: the text is complete, an end-of-sequence token came, or `error`."""
        return self.inner.is_stopped()

    @property
    def error(self) -> str | None:
        """Why there is no going on. To be looked at after each mask and each token."""
        return _reason(self.inner) if self.inner.is_error() else None

    def fill(self, row: np.ndarray) -> None:
        """Write the mask of the next token over `row`, int32 [ceil(V / 32)]."""
        check_mask(row)
        self.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def forced_tokens(self) -> list[int]:
        """The tokens that have to come next; none where there is a choice."""
        return self.inner.compute_ff_tokens()


class Grammar:
    """A compiled one: matchers at its beginning, each with a lexer of its own. Only so are masks of
    many completions filled side by side: llguidance locks a lexer, and clones share it."""

    def __init__(self, first: Matcher, make: Callable[[int], Matcher], num_lexers: int):
        self._matchers, self._make, self._num_lexers = [first], make, num_lexers
        self._turns = itertools.count()
        self._lock = threading.Lock()

    def begin(self) -> Matcher:
        """A matcher for one more completion; takes microseconds, but for the first few, each of
        which makes a lexer. Thread-safe."""
        lexer = next(self._turns) % self._num_lexers
        with self._lock:
            while len(self._matchers) <= lexer:
                self._matchers.append(self._make(len(self._matchers)))
        return self._matchers[lexer].clone()


class Vocabulary:
    """A model's tokens as llguidance sees them.

    Making it takes a second for 100 000 tokens, in which no other thread of Python runs. Raises
    ValueError for a tokenizer that llguidance cannot use.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        json_options: Mapping[str, Any],
    ):
        backend = tokenizer.backend_tokenizer
        eos = sorted(token for token in eos_token_ids if backend.id_to_token(token) is not None)
        if not eos:
            raise ValueError(
                "structured output needs an end-of-sequence token; the tokenizer has none"
            )
        self._tokenizer = llguidance.LLTokenizer(
            backend.to_str(), n_vocab=vocab_size, eos_token=eos
        )
        self._json_options = json_options
        added = {
            token: content
            for token, content in backend.get_added_tokens_decoder().items()
            if self._tokenizer.is_special_token(token) and token not in eos
        }
        self._special = SpecialTokens(
            ids={content.content: token for token, content in added.items()},
            in_text=frozenset(token for token, content in added.items() if not content.special),
        )

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises ValueError with the reason, not with the field."""
        text, started = self._grammar(spec), time.monotonic()
        first = self._matcher(text)
        if first.error is not None:
            raise ValueError(first.error)
        seconds = time.monotonic() - started
        num_lexers = min(NUM_LEXERS, 1 + int(LEXER_SECONDS / max(seconds, 1e-6)))
        return Grammar(first, partial(self._matcher, text), num_lexers)

    def _matcher(self, text: str, lexer: int = 0) -> Matcher:
        inner = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        inner.compute_bitmask()  # finds that nothing matches, and what is slow is done here
        return Matcher(inner, lexer)

    def _grammar(self, spec: GrammarSpec) -> str:
        from_lark = llguidance.LLMatcher.grammar_from_lark
        if spec.field == "json_schema":
            schema = with_options(parse_schema(spec.text), self._json_options)
            return llguidance.LLMatcher.grammar_from_json_schema(schema)
        if spec.field == "regex":
            return llguidance.LLMatcher.grammar_from_regex(spec.text)
        if spec.field == "ebnf":
            return from_lark(lark_grammar(parse_ebnf(spec.text), "root"))
        return from_lark(structural_tag_grammar(spec.text, self._special, self._json_options))


def check_mask(mask: np.ndarray) -> None:
    """Raises ValueError where words of a mask cannot be written in place."""
    if mask.dtype != np.int32 or not mask.flags.c_contiguous or not mask.flags.writeable:
        raise ValueError(f"mask: expected int32 words in a row, got {mask.dtype} {mask.shape}")


def _reason(matcher: llguidance.LLMatcher) -> str:
    reason = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:500]
    if reason.startswith("NoExtension"):
        return "no text matches it"
    if reason.startswith("oneOf"):
        return f'{reason}; to do so put "x-guidance": {{"coerce_one_of": true}} into the schema'
    return reason
