"""The naive loop: one request at a time, the whole sequence anew for every token, no cache. The
engine's oracle; it shares the model's layers with the engine and nothing else."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxengine import models, weights
from jaxengine.hub import read_json
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import dense_batch


def naive_greedy(folder: Path, max_length: int) -> Callable[[Sequence[int], int], list[int]]:
    """A function from prompt and count to the next tokens, the likeliest each time; what it was
    asked once it knows."""
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    abstract = nnx.eval_shape(lambda: models.build(config, dtype="float32"))
    pieces = models.checkpoint_pieces(config)
    params = weights.load_parameters(folder, abstract, pieces, progress=False)
    graphdef = nnx.graphdef(abstract)

    @jax.jit
    def next_token(
        params, tokens: jax.Array, length: jax.Array, prompt_len: jax.Array
    ) -> jax.Array:
        # What stands behind `length` is masked by causality.
        batch = dense_batch(tokens)._replace(prompt_lens=jnp.full(1, prompt_len))
        model = nnx.merge(graphdef, params)
        hidden, _ = model(batch, None)
        return model.logits(hidden[length - 1][None])[0].argmax()

    @functools.cache
    def generate(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        tokens = np.zeros(max_length, np.int32)
        tokens[: len(prompt)] = prompt
        for length in range(len(prompt), len(prompt) + count):
            tokens[length] = next_token(params, tokens, np.int32(length), np.int32(len(prompt)))
        return tuple(tokens[len(prompt) : len(prompt) + count].tolist())

    return lambda prompt, count: list(generate(tuple(prompt), count))
