"""Tiny encoders on disk, as transformers and sentence-transformers write them, with a tokenizer of
whole words."""

import json
from pathlib import Path
from typing import Any

from test_bert import tiny_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"word{index}" for index in range(300)]

MEAN = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_N", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 64, "out_features": 24, "bias": True},
}
"""Mean of all tokens, a layer of 24, then normalised."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP] with the second in segment 1."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


def save_encoder(
    folder: Path, architecture: str, files: dict[str, Any] | None = None, **overrides: Any
) -> Any:
    """Writes model, tokenizer and further JSON files; returns the transformers model."""
    model = tiny_encoder(architecture, **overrides)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return model
