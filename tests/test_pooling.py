"""What is read from the files of sentence-transformers, old and new, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from jaxengine import models
from jaxengine.models.embedder import DenseConfig, EmbedderConfig
from jaxengine.pooling import (
    matryoshka_dimensions,
    max_sequence_length,
    read_embedder,
    read_embeddings,
)

DECODER = tiny.tiny_config("qwen3").to_dict()
ENCODER = {
    "architectures": ["BertModel"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CLASSIFIER = ENCODER | {"architectures": ["BertForSequenceClassification"]}
TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
DENSE = {"type": "sentence_transformers.base.modules.dense.Dense", "path": "2_Dense"}
NORMALIZE = {
    "type": "sentence_transformers.base.modules.normalize.Normalize",
    "path": "3_Normalize",
}
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
PROJECTION = {"in_features": 64, "out_features": 24, "module_input_name": "sentence_embedding"}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def read(folder: Path | None, attributes: dict[str, Any] = ENCODER) -> EmbedderConfig:
    return read_embedder(folder, attributes, models.read_config(attributes))


@pytest.mark.parametrize(
    "content, pooling",
    [
        ({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "lasttoken"),
        ({"embedding_dimension": 64, "pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({}, "mean"),
    ],
)
def test_pooling_is_what_either_form_of_its_file_says(tmp_path, content, pooling):
    files = {"modules.json": [TRANSFORMER, POOLING], "1_Pooling/config.json": content}
    assert read(write(tmp_path, files)) == EmbedderConfig(pooling=pooling, normalizes=False)


def test_dense_and_normalize_follow_in_order(tmp_path):
    files = {
        "modules.json": [TRANSFORMER, POOLING, DENSE, DENSE, NORMALIZE],
        "1_Pooling/config.json": {"pooling_mode": "cls"},
        "2_Dense/config.json": PROJECTION | {"activation_function": IDENTITY},
    }
    found = read(write(tmp_path, files))
    dense = DenseConfig(
        folder="2_Dense", in_features=64, out_features=24, has_bias=True, activation="identity"
    )
    assert found == EmbedderConfig(pooling="cls", dense=(dense, dense), normalizes=True)
    assert read_embeddings(tmp_path, ENCODER, models.read_config(ENCODER)).size == 24


def test_without_the_files_the_last_token_of_decoders_and_the_first_of_encoders_is_normalised(
    tmp_path,
):
    for folder in (tmp_path, None):
        assert read(folder, DECODER) == EmbedderConfig(pooling="lasttoken", normalizes=True)
        assert read(folder, ENCODER) == EmbedderConfig(pooling="cls", normalizes=True)


@pytest.mark.parametrize(
    "change, files, activation",
    [
        ({}, {}, "identity"),
        ({"sbert_ce_default_activation_function": SIGMOID}, {}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, {}, "identity"),
        ({"sentence_transformers": {"version": "4.1"}}, {}, "identity"),
        (
            {},
            {"config_sentence_transformers.json": {"activation_fn": SIGMOID}},
            "sigmoid",
        ),
    ],
)
def test_a_classifier_gives_logits_or_what_its_files_make_of_them(
    tmp_path, change, files, activation
):
    attributes = CLASSIFIER | change
    found = read(write(tmp_path, files | {"modules.json": [TRANSFORMER]}), attributes)
    assert found == EmbedderConfig(pooling="cls", activation=activation, normalizes=False)
    config = models.read_config(attributes | {"num_labels": 3})
    assert read_embeddings(tmp_path, attributes, config).size == 3


@pytest.mark.parametrize(
    "modules, files, named",
    [
        ([TRANSFORMER, {"type": "my_code.Router", "path": "1_x"}], {}, "got Router"),
        ([POOLING, TRANSFORMER], {"1_Pooling/config.json": {}}, "in this order, got Transformer"),
        ([TRANSFORMER, DENSE, POOLING], {"2_Dense/config.json": PROJECTION}, "got Pooling"),
        ([TRANSFORMER, {"type": "Pooling", "path": "../x"}], {}, "beside it, got '../x'"),
        ([TRANSFORMER, {"type": "Pooling"}], {}, "modules.json.*type and a path"),
        ({"a": 1}, {}, "modules.json.*type and a path"),
        ([TRANSFORMER, POOLING], {}, "1_Pooling/config.json cannot be read"),
        (
            [TRANSFORMER, POOLING],
            {"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}},
            "pooling_mode: expected one of cls, .*got weightedmean",
        ),
        (
            [TRANSFORMER, POOLING],
            {"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}},
            "got cls with mean",
        ),
        (
            [TRANSFORMER, DENSE],
            {"2_Dense/config.json": PROJECTION | {"activation_function": "my_code.Run"}},
            "activation.*Tanh.*got 'my_code.Run'",
        ),
        (
            [TRANSFORMER, DENSE],
            {"2_Dense/config.json": PROJECTION | {"module_input_name": "token_embeddings"}},
            "module_input_name = 'token_embeddings'",
        ),
        ([TRANSFORMER, DENSE], {"2_Dense/config.json": PROJECTION | {"gate": 1}}, "gate = 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, modules, files, named):
    with pytest.raises(ValueError, match=named):
        read(write(tmp_path, files | {"modules.json": modules}))


def test_a_classifier_with_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation_fn.*Sigmoid.*got 'os.system'"):
        read(None, CLASSIFIER | {"sbert_ce_default_activation_function": "os.system"})


def test_embeddings_are_cut_only_where_the_config_says_so():
    assert not matryoshka_dimensions({}, 64)
    assert not matryoshka_dimensions({"is_matryoshka": False}, 64)
    assert matryoshka_dimensions({"is_matryoshka": True}, 64) == range(1, 65)
    assert matryoshka_dimensions({"matryoshka_dimensions": [16, 32]}, 64) == (16, 32)
    models.read_config(DECODER | {"is_matryoshka": True, "matryoshka_dimensions": [16]})


def test_sequences_are_as_long_as_the_shorter_limit_allows(tmp_path):
    assert max_sequence_length(None) is None
    assert max_sequence_length(tmp_path) is None
    write(tmp_path, {"tokenizer_config.json": {"model_max_length": 512}})
    assert max_sequence_length(tmp_path) == 512
    write(tmp_path, {"sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False}})
    assert max_sequence_length(tmp_path) == 256
    write(tmp_path, {"sentence_xlm-roberta_config.json": {"max_seq_length": None}})
    write(tmp_path, {"tokenizer_config.json": {"model_max_length": 1e30}})
    assert max_sequence_length(tmp_path) == 256
    write(tmp_path, {"sentence_bert_config.json": {"do_lower_case": True}})
    with pytest.raises(ValueError, match="do_lower_case = True"):
        max_sequence_length(tmp_path)


def test_only_a_decoder_read_at_its_last_token_may_read_in_parts(tmp_path):
    def reads_whole(attributes):
        return read_embeddings(tmp_path, attributes, models.read_config(attributes)).reads_whole

    assert not reads_whole(DECODER)
    assert reads_whole(ENCODER) and reads_whole(CLASSIFIER)
    files = {"modules.json": [TRANSFORMER, POOLING], "1_Pooling/config.json": {}}
    write(tmp_path, files)
    assert reads_whole(DECODER)
