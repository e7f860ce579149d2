"""The trained model as a Hugging Face folder: weights, configs, tokenizer and model card.
It knows names and formats; the numbers on the card are handed to it."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from safetensors.flax import save_file
from tokenizers import Tokenizer

from jaxengine.models import checkpoint_pieces
from jaxengine.models.config import ModelConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CARD = """---
license: psfl
language: en
library_name: jaxengine
pipeline_tag: text-generation
---

# The demo model of jaxengine

A very small Qwen3-shaped language model that has read the documentation of Python. It is shipped
with jaxengine so that the first command, the tests and the examples work offline. It completes
text, and answers questions in a chat template.

| | |
|---|---|
| architecture | Qwen3ForCausalLM: {layers} layers, width {width}, tied embeddings |
| attention | {heads} query heads and {kv_heads} kv heads of {head_size} |
| parameters | {parameters:,} (bfloat16, {size:,} bytes) |
| context | {context:,} tokens |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, trained on the same text |
| corpus | {entries:,} entries, {characters:,} characters, of Python {python} |
| training | {steps:,} steps of {tokens_per_step:,} tokens, {seconds:.0f} s on one {device} |
| training loss | {loss:.3f} nats per token at the end |
| held-out loss | {held_out:.3f} at the end, {lowest:.3f} at its lowest |

## Data
The language reference's topics (`pydoc_data.topics`), docstrings of the built-ins, docstrings and
comments of the standard library; prose only. From the same paragraphs, questions are made by
template and answered by the first paragraphs. Nothing else was read, and no other model was used.
The held-out text is that of whole modules of the standard library, {held_out_tokens:,} tokens.

## Training
AdamW, peak learning rate {learning_rate}, cosine to zero. From a checkout, with the extra `train`:

    python examples/train_demo_model.py --out DIR --steps {steps} \\
      --tokens-per-step {tokens_per_step} --learning-rate {learning_rate}

The weights are the last ones, not those of the lowest held-out loss: a demo had better know the
documentation by heart, and the distance between the two losses says how far this one does.

## Limits
It knows Python's documentation and nothing else, confuses similar names, makes up what it has not
read, and writes no code. Do not rely on what it says.

## Licence
The text is Python's, copyright Python Software Foundation, under the PSF License Agreement
(https://docs.python.org/3/license.html). The model repeats passages of it word for word, so its
weights are distributed under the same licence. The training code is Apache-2.0.
"""


def save(folder: Path, model: nnx.Module, config: dict, tokenizer: Tokenizer, report: dict) -> None:
    """Write everything that `transformers` or an engine needs to serve the model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint(model, ModelConfig.from_dict(config))
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable to its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", _generation_config(config))
    _write(folder / "tokenizer_config.json", _tokenizer_config(config))
    parameters = sum(tensor.size for tensor in tensors.values())
    report = report | dict(size=weights.stat().st_size, parameters=parameters)
    (folder / "README.md").write_text(_card(config, report))


def checkpoint(model: nnx.Module, config: ModelConfig) -> dict[str, jax.Array]:
    """The parameters under Hugging Face's names and in its shapes: matrices are (out, in)."""
    tensors = {}
    for path, pieces in checkpoint_pieces(config).items():
        parameter = reduce(_child, path.split("."), model)[...]
        for piece in pieces:
            part = parameter[piece.index]
            if path.endswith("attention.out"):
                part = part.reshape(part.shape[0], -1)
            tensors[piece.name] = part if part.ndim == 1 else part.reshape(-1, part.shape[-1])
    return tensors


def _child(node: Any, key: str) -> Any:
    return node[int(key)] if key.isdigit() else getattr(node, key)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _generation_config(config: dict) -> dict:
    ids = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
    return dict(**ids, do_sample=True, temperature=0.6, top_p=0.9)


def _tokenizer_config(config: dict) -> dict:
    return dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=config["max_position_embeddings"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _card(config: dict, report: dict) -> str:
    return CARD.format(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        context=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        **report,
    )
