"""Compiles grammars of completions beside the engine's thread, and fills the masks of many rows at
once. It knows neither arrays on a device nor requests."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TypeVar

import llguidance
import numpy as np

from jaxengine.matcher import Grammar, Matcher, Vocabulary, check_mask
from jaxengine.sampling_params import GrammarSpec
from jaxengine.tokenizer import Tokenizer

NUM_THREADS = 4
MASK_THREADS = 4  # that fill masks: few batches have work for more
MIN_BESIDE = 8  # masks that are worth another thread; one takes about ten microseconds

SECONDS = 10.0
"""What compiling may take. llguidance's limits bound nearly everything far below."""

STACK_BYTES = 128 << 20
"""Of a thread that compiles: llguidance recurses along chains of references. Memory that is not
touched costs nothing."""

CACHE_BYTES = 1 << 20
"""Of text whose grammars are kept, a short one counted as `LEAST_BYTES`."""

LEAST_BYTES = 4 << 10

Result = TypeVar("Result")


class GrammarCompiler:
    """Grammars for a model's tokens. Methods may be called from any thread.

    Args:
        tokenizer: None where the engine has none; every grammar is refused then.
        vocab_size: V, the width of the logits. Ids that the tokenizer lacks are never allowed.
        eos_token_ids: allowed where a completion may end, and nowhere else.
        whitespace_pattern: an expression for whitespace in JSON; None: any, or none at all if not
            `any_whitespace`.
        seconds: what compiling a grammar may take.

    Raises ValueError for an expression that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Collection[int],
        *,
        whitespace_pattern: str | None = None,
        any_whitespace: bool = True,
        seconds: float = SECONDS,
    ):
        options = _json_options(whitespace_pattern, any_whitespace)
        self._make_vocabulary = (
            None
            if tokenizer is None
            else partial(Vocabulary, tokenizer, vocab_size, eos_token_ids, options)
        )
        self._seconds = seconds
        self._workers = ThreadPoolExecutor(NUM_THREADS, "jaxengine-grammar")
        self._beside = ThreadPoolExecutor(1, "jaxengine-masks")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()
        self._vocabulary: Future[Vocabulary] | None = None

    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        """What the matcher of each completion begins with.

        All who ask for the same share the future: it is not to be cancelled. Its error is a
        ValueError that names the field. Raises ValueError where there is no tokenizer.
        """
        if self._make_vocabulary is None:
            raise ValueError(
                f"{spec.field}: structured output needs a tokenizer, got none; start the engine "
                "without skip_tokenizer_init"
            )
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._workers.submit(self._make_vocabulary)
            if spec not in self._compiled:
                self._compiled[spec] = self._workers.submit(self._compile, spec, self._vocabulary)
                self._evict()
            self._compiled.move_to_end(spec)
            return self._compiled[spec]

    def clear(self) -> None:
        """Forget what was compiled."""
        with self._lock:
            self._compiled.clear()

    def close(self) -> None:
        """Compile nothing any more, without waiting for what is on its way."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._beside.shutdown(wait=False)

    def begin_masks(self, matchers: Sequence[Matcher | None], out: np.ndarray) -> Future[None]:
        """`fill_masks` while the caller goes on, who must leave all of them alone until it has
        ended."""
        if len(matchers) - matchers.count(None) < MIN_BESIDE:
            self.fill_masks(matchers, out)
            done: Future[None] = Future()
            done.set_result(None)
            return done
        began: queue.SimpleQueue[None] = queue.SimpleQueue()

        def fill() -> None:
            began.put(None)
            self.fill_masks(matchers, out)

        filled = self._beside.submit(fill)
        began.get()  # so that thread is let run, until it needs no interpreter
        return filled

    def fill_masks(self, matchers: Sequence[Matcher | None], out: np.ndarray) -> None:
        """Write the mask of each row's next token over `out`, int32 [B, ceil(V / 32)].

        Rows are shared out to threads that need no interpreter. In rows without a matcher all
        tokens are allowed.
        """
        check_mask(out)
        if len(matchers) != len(out):
            raise ValueError(f"matchers: expected one for each of {len(out)} rows")
        out[[i for i, matcher in enumerate(matchers) if matcher is None]] = -1
        rows = [(matcher, i) for i, matcher in enumerate(matchers) if matcher is not None]
        if rows:
            rows.sort(key=lambda row: row[0].lexer)  # neighbours go to the same thread
            rows = [(matcher.inner, i) for matcher, i in rows]
            self._fillers.unsafe_compute_mask_ptr(rows, out.ctypes.data, out[0].nbytes, len(out))

    @cached_property
    def _fillers(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(num_threads=MASK_THREADS)

    def _compile(self, spec: GrammarSpec, vocabulary: Future[Vocabulary]) -> Grammar:
        try:
            tokens = vocabulary.result()
            return _within(self._seconds, lambda: tokens.compile(spec))
        except TimeoutError:
            raise ValueError(
                f"{spec.field}: compiling it took more than {self._seconds} s; simplify it"
            ) from None
        except ValueError as error:
            raise ValueError(f"{spec.field}: {error}") from error

    def _evict(self) -> None:
        sizes = [max(len(spec.text), LEAST_BYTES) for spec in self._compiled]
        excess = sum(sizes) - CACHE_BYTES
        for size in sizes[:-1]:
            if excess <= 0:
                break
            self._compiled.popitem(last=False)
            excess -= size


def _json_options(whitespace_pattern: str | None, any_whitespace: bool) -> dict[str, object]:
    options: dict[str, object] = {"whitespace_flexible": any_whitespace}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
        grammar = llguidance.LLMatcher.grammar_from_json_schema({"x-guidance": options})
        error = llguidance.LLMatcher.validate_grammar(grammar)
        if error:
            raise ValueError(
                "constrained_json_whitespace_pattern: expected a regular expression, got "
                f"{whitespace_pattern!r}: {error}"
            )
    return options


_starting = threading.Lock()  # the size of stacks is a setting of the process


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns, on a thread of its own, which is left to itself after `seconds`.

    Raises TimeoutError then, else what `call` raises.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="jaxengine-grammar-limited", daemon=True).start()
        finally:
            threading.stack_size(before)
    return future.result(seconds)
