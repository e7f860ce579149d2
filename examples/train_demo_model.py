"""Trains the embedded demo model: a small Qwen3 that has read the documentation of Python.

    python examples/train_demo_model.py --out DIR --minutes 4

The text is what every Python carries (`demo_model/corpus.py`), under the PSF licence, and questions
about it (`demo_model/chats.py`). A byte-level BPE tokenizer is trained on it, then the engine's own
model, from scratch, with Flax NNX and optax on one GPU. The result is a Hugging Face folder with a
model card (`demo_model/folder.py`). Needs the extra `train`. This file knows no engine, only the
model that the engine serves.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_model.corpus import Entry, entries
from demo_model.folder import save
from demo_model.text import END, END_OF_TEXT, SPECIAL, Data, rendered, split, tokenized
from demo_model.text import train_tokenizer as new_tokenizer
from flax import nnx
from tokenizers import Tokenizer

from jaxengine.models import build
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import dense_batch

VOCAB_SIZE = 4096
CONTEXT = 2048
LENGTHS = (512, 512, 512, CONTEXT)  # windows of successive dispatches: most documents are short
NOISE = 0.05  # share of input tokens replaced at random, so that one wrong token is no disaster
WARM_UP = 0.02
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    hidden_act="silu",
    attention_bias=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    dtype="bfloat16",
    eos_token_id=[SPECIAL.index(END), SPECIAL.index(END_OF_TEXT)],
    pad_token_id=SPECIAL.index(END_OF_TEXT),
)
PROMPTS = (
    "The import statement",
    "A dictionary is",
    "If the file does not exist,",
    "Once upon a time",
)
QUESTIONS = (
    *("Hello!", "Who are you?", "What does str.split do?", "Explain the import statement."),
    *("What is the textwrap module for?", "What is a list?", "How do I open a file?"),
)


class State(NamedTuple):
    """What training changes."""

    params: nnx.State  # float32
    adam: optax.OptState
    key: jax.Array


def main() -> None:
    args = arguments()
    python, corpus = read(args.corpus) if args.corpus else (platform.python_version(), entries())
    if args.prepare:
        args.prepare.write_text(json.dumps([python, [asdict(entry) for entry in corpus]], indent=0))
        return
    config = CONFIG | {"num_hidden_layers": args.layers}
    trained_on, held_out = split(corpus)
    tokenizer = new_tokenizer(trained_on, VOCAB_SIZE)
    data = tokenized(tokenizer, trained_on, held_out, args.passes, CONTEXT)
    characters = sum(len(p) for entry in corpus for p in entry.paragraphs)
    report = dict(
        python=python,
        entries=len(corpus),
        characters=characters,
        held_out_tokens=data.held_out[:, 1:].size,
        device=jax.devices()[0].device_kind,
        tokens_per_step=args.tokens_per_step,
        learning_rate=args.learning_rate,
    )
    size = data.tokens.size
    print(f"{len(corpus):,} entries, {characters:,} characters, {size:,} tokens to draw from")
    model, numbers = train(ModelConfig.from_dict(config), data, args)
    save(args.out, model, config, tokenizer, report | numbers)
    turn = rendered([("assistant", "")]).removesuffix(f"{END}\n")
    asked = (rendered([("user", question)]) + turn for question in QUESTIONS)
    for prompt in (*PROMPTS, *asked):
        print(f"\n{prompt!r}\n{complete(model, tokenizer, prompt)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    option = parser.add_argument
    option("--out", type=Path, default=Path("demo"), help="folder to write")
    option("--minutes", type=float, default=4.0, help="training time, compilation not counted")
    option("--steps", type=int, help="optimizer steps, instead of --minutes")
    option("--prepare", type=Path, metavar="FILE", help="write the corpus to FILE and stop")
    option("--corpus", type=Path, metavar="FILE", help="read it from there, not from this Python")
    option("--learning-rate", type=float, default=2e-3, help="peak; then cosine to zero")
    option("--tokens-per-step", type=int, default=65536)
    option("--steps-per-dispatch", type=int, default=20)
    option("--passes", type=int, default=8, help="renderings of the corpus to draw from")
    option("--layers", type=int, default=CONFIG["num_hidden_layers"])
    return parser.parse_args()


def read(path: Path) -> tuple[str, list[Entry]]:
    """The corpus that --prepare wrote, and the version of the Python it is of."""
    python, rows = json.loads(path.read_text())
    return python, [Entry(**row | {"paragraphs": tuple(row["paragraphs"])}) for row in rows]


def train(config: ModelConfig, data: Data, args: argparse.Namespace) -> tuple[nnx.Module, dict]:
    """The trained model in bfloat16, and the numbers for its card."""
    graph, params = nnx.split(build(config, dtype="float32"))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    )
    state = State(params, optimizer.init(params), jax.random.key(0))
    programs = {}
    for length in set(LENGTHS):
        shape = (args.steps_per_dispatch, args.tokens_per_step // length, length)
        programs[length] = run.lower(graph, optimizer, shape, state, data, jnp.float32(0)).compile()
    print(f"compiled; {sum(p.size for p in jax.tree.leaves(params)):,} parameters", flush=True)

    began = printed = time.perf_counter()
    step, progress, lowest = 0, 0.0, float("inf")
    while progress < 1:
        length = LENGTHS[step // args.steps_per_dispatch % len(LENGTHS)]
        rate = args.learning_rate * schedule(progress)
        state, loss = programs[length](state, data, jnp.float32(rate))
        loss, step = float(loss), step + args.steps_per_dispatch
        seconds = time.perf_counter() - began
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if progress >= 1 or seconds - printed > 10:
            held_out = float(evaluate(graph, state.params, data.held_out))
            lowest, printed = min(lowest, held_out), seconds
            speed = step * args.tokens_per_step / seconds
            print(
                f"step {step:6} {seconds:5.0f} s {speed:11,.0f} tokens/s "
                f"loss {loss:.3f} held-out {held_out:.3f}",
                flush=True,
            )
    numbers = dict(steps=step, seconds=seconds, loss=loss, held_out=held_out, lowest=lowest)
    return nnx.merge(graph, cast(state.params)), numbers


def schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    return min(1.0, (progress + 1e-3) / WARM_UP) * (0.5 + 0.5 * np.cos(np.pi * progress))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def run(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shape: tuple[int, int, int],
    state: State,
    data: Data,
    rate: jax.Array,
) -> tuple[State, jax.Array]:
    """Optimizer steps on random windows that begin where a document does, and their mean loss."""
    steps, batch, length = shape

    def step(state: State, _: None) -> tuple[State, jax.Array]:
        key, window_key, noise_key = jax.random.split(state.key, 3)
        starts = jax.random.choice(window_key, data.starts, (batch, 1))
        windows = data.tokens[starts + jnp.arange(length + 1)[None]]
        inputs, targets = noisy(noise_key, windows[:, :-1]), windows[:, 1:]
        loss, gradients = jax.value_and_grad(loss_of, argnums=1)(
            graph, state.params, inputs, targets
        )
        updates, adam = optimizer.update(gradients, state.adam, state.params)
        params = jax.tree.map(lambda param, update: param - rate * update, state.params, updates)
        return State(params, adam, key), loss

    state, losses = jax.lax.scan(step, state, length=steps)
    return state, losses.mean()


def noisy(key: jax.Array, tokens: jax.Array) -> jax.Array:
    """Some tokens replaced by others; the special ones stay, for nothing else marks who speaks."""
    which, what = jax.random.split(key)
    noise = jax.random.randint(what, tokens.shape, len(SPECIAL), VOCAB_SIZE)
    replaced = jax.random.bernoulli(which, NOISE, tokens.shape) & (tokens >= len(SPECIAL))
    return jnp.where(replaced, noise, tokens)


def loss_of(
    graph: nnx.GraphDef, params: nnx.State, inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    """Mean cross-entropy of the next token: bfloat16 activations, float32 logits."""
    model = nnx.merge(graph, cast(params))
    logits = jax.vmap(lambda tokens: model.logits(model(dense_batch(tokens), None)[0]))(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@partial(jax.jit, static_argnums=0)
def evaluate(graph: nnx.GraphDef, params: nnx.State, windows: jax.Array) -> jax.Array:
    return loss_of(graph, params, windows[:, :-1], windows[:, 1:])


def cast(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda param: param.astype(jnp.bfloat16), params)


def complete(model: nnx.Module, tokenizer: Tokenizer, prompt: str, longest: int = 160) -> str:
    """The greedy continuation, computed anew from the first token for every token."""
    graph, params = nnx.split(model)
    ids = tokenizer.encode(prompt).ids
    begin = len(ids)
    while len(ids) < longest:
        padded = jnp.array(ids + [0] * (longest - len(ids)), jnp.int32)
        token = int(next_token(graph, params, padded, len(ids)))
        if token < len(SPECIAL):
            break
        ids.append(token)
    return tokenizer.decode(ids[begin:])


@partial(jax.jit, static_argnums=0)
def next_token(
    graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, length: jax.Array
) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden, _ = model(dense_batch(tokens), None)
    return model.logits(hidden[length - 1][None])[0].argmax()


if __name__ == "__main__":
    main()
