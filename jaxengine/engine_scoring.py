"""The methods of an engine that score text. Each is one call of `generate`; what is asked and what
the answer means is told in `scoring`."""

from collections.abc import Sequence
from typing import Any

from jaxengine import scoring
from jaxengine.signatures import takes


class ScoringMethods:
    """Of a class that has `generate`, `async_generate` and `_encoder`."""

    generate: Any
    async_generate: Any
    _encoder: scoring.Encoder

    def score(
        self,
        query: str | Sequence[int] | None = None,
        items: str | Sequence[Any] | None = None,
        label_token_ids: Sequence[Any] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
        *,
        temperature: float = 1.0,
        return_token_logprobs: bool = False,
    ) -> scoring.ScoreResult:
        """The probability of each label as the next token behind `query + item`: a row for each
        item, a column for each label.

        The query's full pages of K and V are computed once, whatever the number of items, unless
        all tokens are to be told of.

        Args:
            query, items: a text and a list of texts, or token ids and a list of such lists.
            label_token_ids: ids of the labels; one list for all items, or one each.
            apply_softmax: among the labels alone instead of the whole vocabulary.
            item_first: `item + query` instead.
            temperature: divides the logits.
            return_token_logprobs: `token_logprobs` of the result has those of all prompt tokens.

        Raises:
            ValueError: text and ids mixed, no labels, or labels outside the vocabulary.
        """
        question = scoring.Question(
            query,
            items,
            label_token_ids,
            apply_softmax,
            item_first,
            temperature,
            return_token_logprobs,
        )
        asked = question.arguments()
        return question.scores(self.generate(**asked) if items else [])

    @takes(score)
    async def async_score(self, *args: Any, **kwargs: Any) -> scoring.ScoreResult:
        """`score` for coroutines."""
        question = scoring.Question(*args, **kwargs)
        asked = question.arguments()
        return question.scores(await self.async_generate(**asked) if question.items else [])

    def loglikelihood(self, context: str | Sequence[Any], continuation: str | Sequence[Any]) -> Any:
        """`(sum, is_greedy)`: the log-probability of a continuation given its context, and whether
        greedy decoding would give it. Of two texts, or of two lists of texts or of lists of ids,
        and then a list. Equal beginnings of contexts are computed once.

        Raises:
            ValueError: a context or a continuation without tokens, or lists of different lengths.
        """
        is_one = scoring.is_one(context)
        contexts, continuations = (
            [part] if is_one else list(part) for part in (context, continuation)
        )
        asked = scoring.likelihood_arguments(contexts, continuations, self._encoder)
        found = scoring.likelihoods(self.generate(**asked)) if contexts else []
        return found[0] if is_one else found

    def perplexity(self, prompt: str | Sequence[Any]) -> Any:
        """exp of the mean negative log-probability of all tokens but the first: of a text or a list
        of ids, or of each of a list of such."""
        is_one = scoring.is_one(prompt)
        prompts = [prompt] if is_one else list(prompt)
        asked = scoring.perplexity_arguments(prompts)
        found = scoring.perplexities(self.generate(**asked)) if prompts else []
        return found[0] if is_one else found
