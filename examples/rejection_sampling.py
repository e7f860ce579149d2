"""Rejection-sampling fine-tuning: generate, keep what a reward likes, train on it, and go on with
the new weights, which the running engine takes without a restart.

python examples/rejection_sampling.py [--model-path FOLDER_OR_HUB_ID] [--rounds 3] [--samples 256]

The reward likes short whole sentences that speak of "the" something. Needs the extra `train`.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxengine
from jaxengine.loading import abstract_model, find_model, load_parameters
from jaxengine.models.interface import dense_batch

PROMPTS = [
    "The import statement",
    "A dictionary is",
    "The global statement",
    "The with statement",
    "A function",
    "The method",
    "A list",
    "The value",
]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 32}
LENGTH = 48  # tokens of a sequence that is trained on
BATCH = 16  # sequences of an optimizer step


def main() -> None:
    args = arguments()
    llm = jaxengine.Engine(model_path=args.model_path, context_length=256, random_seed=0)
    graph, params = nnx.split(trainable(llm.server_args))
    optimizer = optax.adam(args.learning_rate)
    adam = optimizer.init(params)
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    asked = prompts * (args.samples // len(prompts))
    rng = np.random.default_rng(0)

    for number in range(args.rounds + 1):
        outputs = llm.generate(input_ids=asked, sampling_params=SAMPLING)
        rewards = [reward(output["text"]) for output in outputs]
        print(f"after {number} rounds of training the reward is {np.mean(rewards):.3f}", flush=True)
        if number == args.rounds:
            break
        pairs = zip(asked, outputs, rewards, strict=True)
        kept = [example(prompt, output["output_ids"]) for prompt, output, liked in pairs if liked]
        tokens, is_target = map(np.stack, zip(*kept, strict=True))
        for _ in range(args.steps):
            rows = rng.integers(len(kept), size=BATCH)
            batch = tokens[rows], is_target[rows]
            params, adam, loss = step(graph, optimizer, params, adam, *batch)
        # The engine copies them on the device; the next step may donate these arrays.
        llm.update_weights(params, weight_version=f"round {number + 1}")
        print(f"trained on {len(kept)} of {len(asked)} samples, last loss {loss:.3f}")
    for prompt, output in zip(PROMPTS, outputs, strict=False):
        print(f"{prompt!r} goes on: {output['text']!r}")
    llm.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a model on its own best samples.")
    option = parser.add_argument
    option("--model-path", help="default: the embedded model")
    option("--rounds", type=int, default=3)
    option("--samples", type=int, default=256, help="completions of a round")
    option("--steps", type=int, default=10, help="optimizer steps of a round")
    option("--learning-rate", type=float, default=6e-5)
    return parser.parse_args()


def reward(text: str) -> bool:
    return text.endswith(".") and " the " in text


def trainable(args: jaxengine.ServerArgs) -> nnx.Module:
    """The engine's model again, in float32."""
    found = find_model(args)
    abstract = abstract_model(found.config, "float32")
    params = load_parameters(args, found, abstract, jax.devices()[0])
    return nnx.merge(nnx.graphdef(abstract), params)


def example(prompt: list[int], output_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, padded, and which of them the model is to learn."""
    ids = (prompt + output_ids)[:LENGTH]
    tokens = np.pad(np.array(ids, np.int32), (0, LENGTH - len(ids)))
    places = np.arange(LENGTH)
    return tokens, (len(prompt) <= places) & (places < len(ids))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    params: nnx.State,
    adam: optax.OptState,
    tokens: jax.Array,
    is_target: jax.Array,
) -> tuple[nnx.State, optax.OptState, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_of, argnums=1)(graph, params, tokens, is_target)
    updates, adam = optimizer.update(gradients, adam)
    return jax.tree.map(jnp.add, params, updates), adam, loss


def loss_of(
    graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, is_target: jax.Array
) -> jax.Array:
    """Mean cross-entropy of the targets, each given what stands before it."""
    model = nnx.merge(graph, params)
    logits = jax.vmap(lambda row: model.logits(model(dense_batch(row), None)[0]))(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses, where=is_target[:, 1:])


if __name__ == "__main__":
    main()
