"""Scores as questions to `generate` and what its answers say: the arguments of the call, and the
numbers in its results. Nothing here runs a model."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

Encoder = Callable[[Iterable[Any]], Callable[[Any], Sequence[int]]]
NOTHING_NEW = {"max_new_tokens": 0}


class ScoreResult(list[list[float]]):
    """A row for each item, a column for each label; with the names that later versions of SGLang
    use."""

    prompt_tokens: int = 0
    token_logprobs: list[list[float | None]] | None = None

    @property
    def scores(self) -> list[list[float]]:
        return list(self)


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    sum: float  # of the log-probabilities of its tokens
    is_greedy: bool  # whether each of them is the likeliest


class Question(NamedTuple):
    """What `score` is asked, under its names."""

    query: Any = None
    items: Any = None
    label_token_ids: Any = None
    apply_softmax: bool = False
    item_first: bool = False
    temperature: float = 1.0
    return_token_logprobs: bool = False

    def arguments(self) -> dict[str, Any]:
        """Of a call of `generate`, which tells the log-probabilities of labels behind query and
        item, and if these are wanted those of all their tokens.

        Raises:
            ValueError: not both text or both ids, or labels that are none.
        """
        query, items = self.query, self._items()
        join = (lambda item: item + query) if self.item_first else (lambda item: query + item)
        is_text = isinstance(query, str)
        return {
            "prompt" if is_text else "input_ids": [
                join(item if is_text else list(item)) for item in items
            ],
            "sampling_params": NOTHING_NEW | {"temperature": self.temperature},
            "return_logprob": True,
            "logprob_start_len": 0 if self.return_token_logprobs else -1,
            "token_ids_logprob": self._labels(len(items)),
        }

    def scores(self, results: Sequence[Mapping[str, Any]]) -> ScoreResult:
        """Probabilities of the labels, among the whole vocabulary or, with `apply_softmax`, among
        the labels alone."""
        rows = ScoreResult()
        for result in results:
            [entries] = result["meta_info"]["output_token_ids_logprobs"]
            logprobs = [logprob for logprob, *_ in entries]
            peak = max(logprobs) if self.apply_softmax else 0.0
            weights = [math.exp(logprob - peak) for logprob in logprobs]
            total = sum(weights) if self.apply_softmax else 1.0
            rows.append([weight / total for weight in weights])
        rows.prompt_tokens = sum(result["meta_info"]["prompt_tokens"] for result in results)
        if self.return_token_logprobs:
            rows.token_logprobs = [_input_logprobs(result) for result in results]
        return rows

    def _items(self) -> Sequence[Any]:
        query, items = self.query, self.items
        if isinstance(query, str):
            items = [items] if isinstance(items, str) else items
            if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
                raise ValueError(f"items: expected text, as the query is, got {short(items)}")
            return items
        is_list = isinstance(items, list | tuple)
        if not _is_ids(query) or not is_list or not all(map(_is_ids, items)):
            raise ValueError(
                "query, items: expected a text and a list of texts, or token ids and a list of "
                f"such lists, got {short(query)} and {short(items)}"
            )
        return items

    def _labels(self, num_items: int) -> list[list[int]]:
        labels = self.label_token_ids
        is_list = isinstance(labels, list | tuple) and bool(labels)
        if not is_list or not (_is_ids(labels) or all(map(_is_ids, labels))):
            raise ValueError(
                f"label_token_ids: expected token ids, or for each item some, got {short(labels)}"
            )
        each = [labels] * num_items if _is_ids(labels) else labels
        if len(each) != num_items:
            raise ValueError(
                f"label_token_ids: expected {num_items} lists, one an item, got {len(each)}"
            )
        return [list(of_item) for of_item in each]


def likelihood_arguments(
    contexts: Sequence[Any], continuations: Sequence[Any], encoder: Encoder
) -> dict[str, Any]:
    """What to ask `generate` for the log-likelihood of continuations, each given its context.

    Texts are tokenised together; what the context's own tokens leave is the continuation.
    `encoder` takes all texts that are to be tokenised, and gives what does so.
    """
    if len(contexts) != len(continuations):
        raise ValueError(
            f"continuation: expected {len(contexts)}, one a context, got {len(continuations)}"
        )
    pairs = list(zip(contexts, continuations, strict=True))
    encode = encoder(
        text
        for context, continuation in pairs
        if isinstance(context, str)
        for text in (context, context + continuation)
    )
    whole, starts = [], []
    for index, (context, continuation) in enumerate(pairs):
        if isinstance(context, str):
            before, ids = encode(context), encode(context + continuation)
        else:
            before, ids = list(context), [*context, *continuation]
        if not before or len(ids) <= len(before):
            raise ValueError(
                f"context, continuation: expected some tokens of each, got {len(before)} and "
                f"{len(ids) - len(before)} for number {index}; of a text alone take the perplexity"
            )
        whole.append(ids)
        starts.append(len(before) - 1)
    return {
        "input_ids": whole,
        "sampling_params": NOTHING_NEW,
        "return_logprob": True,
        "logprob_start_len": starts,
        "top_logprobs_num": 1,
    }


def likelihoods(results: Sequence[Mapping[str, Any]]) -> list[Likelihood]:
    found = []
    for result in results:
        info = result["meta_info"]
        entries = info["input_token_logprobs"][1:]
        likeliest = [top[0][1] for top in info["input_top_logprobs"][1:]]
        is_greedy = [token for _, token, _ in entries] == likeliest
        found.append(Likelihood(sum(logprob for logprob, *_ in entries), is_greedy))
    return found


def perplexity_arguments(prompts: Any) -> dict[str, Any]:
    """What to ask `generate` for the perplexity of a list of texts, or of lists of ids."""
    is_text = all(isinstance(prompt, str) for prompt in prompts)
    return {
        "prompt" if is_text else "input_ids": list(prompts),
        "sampling_params": NOTHING_NEW,
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def perplexities(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """exp of the mean negative log-probability of each prompt's tokens but the first.

    Raises:
        ValueError: a prompt of one token, which has none.
    """
    found = []
    for index, result in enumerate(results):
        logprobs = _input_logprobs(result)[1:]
        if not logprobs:
            raise ValueError(f"prompt {index}: expected at least two tokens, got one")
        found.append(math.exp(-sum(map(float, logprobs)) / len(logprobs)))  # type: ignore[arg-type]
    return found


def is_one(prompt: Any) -> bool:
    """Whether it is a text or a list of ids, and not a list of such."""
    return isinstance(prompt, str) or (_is_ids(prompt) and len(prompt) > 0)


def _input_logprobs(result: Mapping[str, Any]) -> list[float | None]:
    return [logprob for logprob, *_ in result["meta_info"]["input_token_logprobs"]]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(each) is int for each in value)
