"""From the corpus to what training reads: documents, a tokenizer, and an array of tokens.
It knows no model."""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from demo_model.chats import Chat, conversations
from demo_model.corpus import Entry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HELD_OUT = 0.02  # of the characters


class Data(NamedTuple):
    """What training reads, on the device."""

    tokens: jax.Array  # [tokens] all documents, in random order, and again, differently rendered
    starts: jax.Array  # [documents] where each begins
    held_out: jax.Array  # [windows, length + 1] of modules that are trained on in no form


def split(corpus: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Training and held-out entries: whole modules, none of the reference or the built-ins."""
    sizes: dict[str, int] = {}
    for entry in corpus:
        if not entry.document.startswith(("topic ", "builtins.")):
            module = entry.document.removesuffix(" comments")
            sizes[module] = sizes.get(module, 0) + sum(map(len, entry.paragraphs))
    left = HELD_OUT * sum(len(p) for entry in corpus for p in entry.paragraphs)
    held = set()
    for module in random.Random(6).sample(sorted(sizes), len(sizes)):
        if sizes[module] <= left:
            held |= {module, f"{module} comments"}
            left -= sizes[module]
    train = [entry for entry in corpus if entry.document not in held]
    return train, [entry for entry in corpus if entry.document in held]


def texts(corpus: list[Entry], rng: random.Random) -> Iterator[str]:
    """Each document once: whole, or every paragraph by itself, from one of its sentences on."""
    documents: dict[str, list[Entry]] = {}
    for entry in corpus:
        documents.setdefault(entry.document, []).append(entry)
    for parts in documents.values():
        if rng.random() < 0.5:
            yield "\n\n".join(f"# {part.name}\n\n{_joined(part.paragraphs)}" for part in parts)
        else:
            for part in parts:
                yield from _excerpts(part.paragraphs, rng)


def _excerpts(paragraphs: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    for index, paragraph in enumerate(paragraphs):
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph.removeprefix("- "))
        first = " ".join(sentences[rng.randrange(len(sentences)) :])
        yield _joined((first, *paragraphs[index + 1 : index + 2]))


def _joined(paragraphs: tuple[str, ...]) -> str:
    return "\n\n".join(paragraphs).replace("\n\n- ", "\n- ")


def rendered(chat: Chat) -> str:
    """The conversation as the chat template has it."""
    return "".join(f"{START}{role}\n{content}{END}\n" for role, content in chat)


def train_tokenizer(corpus: list[Entry], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    contents = [content for chat in conversations(corpus, rng) for _, content in chat]
    tokenizer.train_from_iterator([*texts(corpus, rng), *contents], trainer)
    return tokenizer


def tokenized(
    tokenizer: Tokenizer, train: list[Entry], held_out: list[Entry], passes: int, longest: int
) -> Data:
    """`passes` renderings of the corpus, with `longest` tokens of it repeated at the end."""
    rng = random.Random(1)
    documents: list[str] = []
    for _ in range(passes):
        once = [*texts(train, rng), *map(rendered, conversations(train, rng))]
        documents += rng.sample(once, len(once))
    ids = _encode(tokenizer, documents)
    ends = np.cumsum([len(document) for document in ids], dtype=np.int32)
    tokens = np.concatenate(ids)
    held = np.concatenate(_encode(tokenizer, list(texts(held_out, random.Random(0)))))
    held = held[: len(held) // 513 * 513].reshape(-1, 513)
    tokens = np.concatenate([tokens, tokens[: longest + 1]])
    return Data(jnp.asarray(tokens), jnp.asarray(np.append(0, ends[:-1])), jnp.asarray(held))


def _encode(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    end = SPECIAL.index(END_OF_TEXT)
    encodings = tokenizer.encode_batch(documents)
    return [np.array([*encoding.ids, end], np.int32) for encoding in encodings]
