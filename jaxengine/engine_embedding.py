"""The methods of an engine that makes embeddings or scores labels: calls whose prompts are read and
not continued. What an argument may be is told in `embedding_inputs`."""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxengine.admission import Limits, make_request
from jaxengine.delivery import Call, wait, wait_async
from jaxengine.embedding_inputs import AVAILABLE, check_dimensions, pairs_of, texts_or_ids
from jaxengine.inputs import Entry
from jaxengine.interrupts import heeds_ctrl_c
from jaxengine.loop import Loop
from jaxengine.pooling import Embeddings
from jaxengine.results import EmbeddingWriter
from jaxengine.signatures import takes
from jaxengine.startup import Started
from jaxengine.tokenizer import encode_all
from jaxengine.unavailable import refuse_unavailable


class EmbeddingMethods:
    """Of a class that has what a running engine consists of."""

    _started: Started
    _loop: Loop
    _seeds: random.Random

    def encode(
        self,
        prompt: str | Sequence[Any],
        *,
        dimensions: int | None = None,
        rid: str | Sequence[str] | None = None,
        **unavailable: Any,
    ) -> Any:
        """Embeds a text, or each of a list, and returns `{"embedding": [float, ...], "meta_info"}`
        of each; of a classifier or reward model, the scores of its labels.

        The checkpoint says how (`pooling`), but no instruction of its is put before the text.

        Args:
            prompt: a text, token ids, or a list of either.
            dimensions: only so many of the first dimensions, normalised again where the whole is;
                for models whose config.json has `is_matryoshka` or `matryoshka_dimensions`.
            rid: names for `abort`, by default unique ones.

        Raises:
            ValueError: the engine generates, or some part of the call is wrong; then none of it was
                started.
            RuntimeError: the engine failed or was shut down.
        """
        options = dict(dimensions=dimensions, rid=rid, **unavailable)
        with heeds_ctrl_c():
            return wait(self._embedding_call(prompt, **options))

    @takes(encode)
    async def async_encode(self, prompt: Any, **options: Any) -> Any:
        """`encode` for coroutines."""
        return await wait_async(self._embedding_call(prompt, **options))

    def rerank(self, prompt: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Scores pairs `[query, document]` with a cross-encoder or another classifier: a dictionary
        as that of `encode` for each, whose `embedding` is the score, or a list of those of all
        labels if there are several.

        They are logits, unless the checkpoint names an activation. A reranker that answers yes or
        no, such as Qwen3-Reranker, is a model that generates: without `is_embedding`, ask
        `score(query=..., items=documents, label_token_ids=[yes, no], apply_softmax=True)`, the
        model's instruction and the query in `query`, and what its template has behind the document
        at the end of each item.

        Raises:
            ValueError: the engine is no classifier, or something is no pair of texts.
        """
        embeddings = self._ready("rerank")
        if embeddings.embedder.activation is None:
            raise ValueError(
                "rerank: this model has no labels to score; use a cross-encoder or a classifier "
                "of sequences, or compare the embeddings that encode gives"
            )
        with heeds_ctrl_c():
            return wait(self._pairs_call(prompt, embeddings))

    def _pairs_call(self, prompt: Any, embeddings: Embeddings) -> Call:
        pairs, limits = pairs_of(prompt), self._started.limits
        last_type = embeddings.num_token_types - 1
        # A token of the second text is its id plus the size of the vocabulary (`models.bert`).
        ids = [
            [i + limits.vocab_size * min(kind, last_type) for i, kind in zip(*each, strict=True)]
            for each in self._encoded(pairs)
        ]
        limits = replace(limits, vocab_size=limits.vocab_size * embeddings.num_token_types)
        entries = texts_or_ids([query for query, _ in pairs], None).entries
        write = partial(EmbeddingWriter, scores=True)
        return self._reading_call(entries, ids, limits, write, is_batch=True)

    def _embedding_call(
        self, prompt: Any, *, dimensions: Any = None, rid: Any = None, **unavailable: Any
    ) -> Call:
        embeddings = self._ready("encode")
        refuse_unavailable(unavailable, "encode", AVAILABLE)
        check_dimensions(dimensions, embeddings)
        entries, is_batch = texts_or_ids(prompt, rid)
        if entries and entries[0].input_ids is None:
            ids = [ids for ids, _ in self._encoded([entry.text for entry in entries])]
        else:
            ids = [entry.input_ids for entry in entries]
        normalizes = embeddings.embedder.normalizes
        write = partial(EmbeddingWriter, dimensions=dimensions, normalizes=normalizes)
        return self._reading_call(entries, ids, self._started.limits, write, is_batch=is_batch)

    def _ready(self, method: str) -> Embeddings:
        """What there is to know of embeddings, or the error of an engine that makes none."""
        if not self._loop.is_alive:
            raise self._loop.refusal()
        if self._started.found.embeddings is None:
            way_out = "make one with is_embedding=True"
            if method == "rerank":
                way_out = "load a cross-encoder, or rank with score as help(Engine.rerank) tells"
            raise ValueError(f"{method}: this engine generates; {way_out}")
        return self._started.found.embeddings

    def _encoded(self, texts: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and segments of texts or pairs of texts."""
        if self._started.tokenizer is None:
            raise ValueError(
                "prompt: this engine has no tokenizer (skip_tokenizer_init); pass token ids"
            )
        for index, each in enumerate(encode_all(self._started.tokenizer, texts)):
            if each.overflowing:
                warnings.warn(f"prompt {index} was cut to {len(each.ids)} tokens", stacklevel=4)
            yield each.ids, each.type_ids

    def _reading_call(
        self,
        entries: Sequence[Entry],
        ids: Sequence[Any],
        limits: Limits,
        write: Callable[..., EmbeddingWriter],
        *,
        is_batch: bool,
    ) -> Call:
        """The call of all prompts, or the error of the first that cannot be one."""
        requests = []
        for index, entry in enumerate(entries):
            try:
                requests.append(make_request(entry, ids[index], limits, self._seeds))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}" if is_batch else str(error)) from None
        return Call(requests, list(map(write, requests)), self._loop, is_batch=is_batch, owner=self)
