"""The model that the package carries: its files agree with each other, and it writes English."""

import json
import re
from importlib.resources import files
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from engines import SMALL
from flax import nnx
from safetensors import safe_open
from transformers import AutoTokenizer

from jaxengine import Engine
from jaxengine.models import build, checkpoint_pieces
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import dense_batch
from jaxengine.weights import load_parameters

FOLDER = Path(str(files("jaxengine"))) / "assets" / "demo"
COMMON = set(
    "a an and are as be by can for from if in is it of on or that the this to with".split()
)


@pytest.fixture(scope="module")
def config():
    return ModelConfig.from_dict(json.loads((FOLDER / "config.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def parts(config):
    """The graph and the parameters, in float32."""
    abstract = nnx.eval_shape(lambda: build(config, dtype="float32"))
    parameters = load_parameters(FOLDER, abstract, checkpoint_pieces(config), progress=False)
    return nnx.graphdef(abstract), parameters


def logits_of(parts, ids):
    model = nnx.merge(*parts)
    return model.logits(model(dense_batch(jnp.asarray(ids, jnp.int32)), None)[0])


@pytest.fixture(scope="module")
def engine():
    with Engine(**SMALL | {"model_path": None}) as engine:
        yield engine


def continuation(engine, prompt, limit=200):
    return engine.generate(prompt, {"temperature": 0, "max_new_tokens": limit})


def asked(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def is_prose(text):
    """Whether the words are spelt with letters, held together by common ones, and do not loop."""
    words = re.findall(r"[A-Za-z']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return (
        len(words) >= 20
        and len(re.findall(r"[A-Za-z ,.\n]", text)) >= 0.85 * len(text)
        and 0.2 <= sum(word in COMMON for word in words) / len(words) <= 0.7
        and len(set(triples)) >= 0.8 * len(triples)
        and re.search(r"[a-z)][.:;]", text) is not None
    )


@pytest.mark.parametrize(
    "prompt", ["The import statement", "A dictionary is", "The with statement"]
)
def test_it_continues_a_phrase_with_prose(engine, prompt):
    text = continuation(engine, prompt, 64)["text"]
    assert is_prose(prompt + text), text


@pytest.mark.parametrize(
    ("question", "subject"), [("What does str.split do?", "list"), ("Hello!", "Python")]
)
def test_it_answers_a_question_about_its_subject_and_stops(engine, tokenizer, question, subject):
    result = continuation(engine, asked(tokenizer, question))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
    assert result["output_ids"][-1] == end and "<|" not in result["text"]
    assert subject in result["text"], result["text"]
    assert question == "Hello!" or is_prose(result["text"]), result["text"]


def test_the_wheel_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 17_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000


def test_the_card_says_what_the_files_hold(config):
    card = (FOLDER / "README.md").read_text()
    weights = FOLDER / "model.safetensors"
    with safe_open(weights, framework="numpy") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    parameters = sum(int(np.prod(shape)) for shape in shapes)
    assert f"| parameters | {parameters:,} (bfloat16, {weights.stat().st_size:,} bytes) |" in card
    assert f"| context | {config.max_position:,} tokens |" in card
    assert f"byte-level BPE, {config.vocab_size:,} tokens" in card
    assert f"{config.num_layers} layers, width {config.hidden_size}, tied embeddings" in card
    assert f"{config.num_heads} query heads and {config.num_kv_heads} kv heads" in card
    assert config.max_position >= 2048


def test_the_card_tells_data_losses_licence_and_limits():
    card = (FOLDER / "README.md").read_text()
    assert re.search(r"\| training loss \| \d\.\d{3} nats", card)
    assert re.search(r"\| held-out loss \| \d\.\d{3} at the end, \d\.\d{3} at its lowest \|", card)
    for heading in ("Data", "Training", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card


def test_the_tokenizer_gives_back_any_text_and_agrees_with_the_config(config, tokenizer):
    text = "The import statement\n\n  binds x_1 = f(y);\ttabs, naïve 文 <|im_start|>user\n🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == config.vocab_size
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config.eos_ids == tuple(ends)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_the_chat_template_closes_every_turn(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )


@pytest.mark.oracle
def test_transformers_computes_the_same_logits(parts, tokenizer):
    torch = pytest.importorskip("torch", reason="transformers' model is the oracle")
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = tokenizer("The import statement binds a name in the local namespace.").input_ids
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits_of(parts, ids), expected, atol=1e-3, rtol=1e-4)
