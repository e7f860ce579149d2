"""How a checkpoint makes an embedding of hidden states, as its sentence-transformers files tell.

`modules.json` lists the modules; each has a folder with a config.json. Where there is no such file,
embeddings are normalised, and taken from the last token of a decoder and from the first of an
encoder. Of the prompts in `config_sentence_transformers.json` nothing is done: text is embedded as
it is given, and whoever wants an instruction before it puts it there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.hub import read_json
from jaxengine.models.attributes import Attributes
from jaxengine.models.config import ModelConfig
from jaxengine.models.embedder import POOLINGS, DenseConfig, EmbedderConfig
from jaxengine.models.encoder_config import EncoderConfig

OLDER_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of files older than `pooling_mode`."""

TORCH_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
"""Names in the files -> keys of `embedder.ACTIVATIONS`."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What an engine of embeddings knows of its checkpoint beside the model's configuration."""

    embedder: EmbedderConfig
    size: int  # of an embedding before it is cut
    dimensions: Sequence[int]  # that it may be cut to
    max_length: int | None  # tokens of a sequence, where the files limit them
    reads_whole: bool  # whether a sequence has to be read at once
    num_token_types: int  # 2 where the second text of a pair is told from the first


def read_embeddings(
    folder: Path | None, attributes: Mapping[str, Any], config: ModelConfig | EncoderConfig
) -> Embeddings:
    """What the files of a checkpoint say, whose config.json has these attributes.

    Raises:
        ValueError: a module or setting that is not supported, with its name.
    """
    embedder = read_embedder(folder, attributes, config)
    size = config.num_labels or config.hidden_size
    if embedder.dense:
        size = embedder.dense[-1].out_features
    return Embeddings(
        embedder=embedder,
        size=size,
        dimensions=matryoshka_dimensions(attributes, size),
        max_length=max_sequence_length(folder),
        reads_whole=isinstance(config, EncoderConfig) or embedder.pooling != "lasttoken",
        num_token_types=config.num_token_types if isinstance(config, EncoderConfig) else 1,
    )


def read_embedder(
    folder: Path | None, attributes: Mapping[str, Any], config: ModelConfig | EncoderConfig
) -> EmbedderConfig:
    """How hidden states become an embedding. A classifier gives the logits of its labels, after
    the activation that cross-encoders name."""
    own = "cls" if isinstance(config, EncoderConfig) else "lasttoken"
    if config.head == "labels":
        activation = _classifier_activation(folder, attributes)
        return EmbedderConfig(pooling=own, activation=activation, normalizes=False)
    if folder is None or not (folder / "modules.json").is_file():
        return EmbedderConfig(pooling=own, normalizes=True)
    pooling, dense, normalizes = own, [], False
    order = ["Transformer", "Pooling", "Dense", "Normalize"]  # what may still come
    for kind, path in _modules(folder / "modules.json"):
        if kind not in order:
            raise ValueError(
                f"{folder / 'modules.json'}: expected some of Transformer, Pooling, Dense and "
                f"Normalize in this order, got {kind}; use a model without it"
            )
        order = order[order.index(kind) + (kind != "Dense") :]
        where = folder / path / "config.json"
        if kind == "Pooling":
            pooling = _pooling(Attributes(read_json(where), str(where)))
        elif kind == "Dense":
            dense.append(_dense(Attributes(read_json(where), str(where)), path))
        elif kind == "Normalize":
            normalizes = True
    return EmbedderConfig(pooling=pooling, dense=tuple(dense), normalizes=normalizes)


def matryoshka_dimensions(attributes: Mapping[str, Any], size: int) -> Sequence[int]:
    """The lengths that embeddings of `size` may be cut to: those that config.json lists, any if it
    only says that they may, else none.

    Source: Kusupati et al. 2022, arXiv:2205.13147.
    """
    listed = attributes.get("matryoshka_dimensions")
    if listed:
        return tuple(listed)
    return range(1, size + 1) if attributes.get("is_matryoshka") else ()


def max_sequence_length(folder: Path | None) -> int | None:
    """Tokens of a sequence at most, by the files of sentence-transformers and of the tokenizer."""
    if folder is None:
        return None
    limits = []
    for path in folder.glob("sentence_*_config.json"):
        content = Attributes(read_json(path), str(path))
        content.expect("do_lower_case", False, None)
        limits.append(content.optional_count("max_seq_length", None))
    if (path := folder / "tokenizer_config.json").is_file():
        limits.append(read_json(path).get("model_max_length"))
    return min((int(limit) for limit in limits if limit), default=None)


def _modules(path: Path) -> Iterator[tuple[str, str]]:
    """The class and the folder of each module, in order."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(each["type"]).split(".")[-1], str(each["path"])) for each in content]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a list of modules, each with a type and a path ({error!r}); "
            "download it again"
        ) from error
    for kind, folder in found:
        if folder != Path(folder).name:
            raise ValueError(f"{path}: expected the folder of {kind} beside it, got {folder!r}")
        yield kind, folder


def _pooling(attributes: Attributes) -> str:
    older = [name for key, name in OLDER_POOLINGS.items() if attributes.flag(key)]
    named = attributes.take("pooling_mode", older or "mean")
    modes = named if isinstance(named, list) else [named]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{attributes.where}: pooling_mode: expected one of {', '.join(POOLINGS)}, got "
            f"{' with '.join(map(str, modes))}; use a model with one of them"
        )
    return modes[0]


def _dense(attributes: Attributes, folder: str) -> DenseConfig:
    for name in ("module_input_name", "module_output_name"):
        attributes.expect(name, "sentence_embedding", None)
    attributes.expect("use_residual", False)
    config = DenseConfig(
        folder=folder,
        in_features=attributes.count("in_features"),
        out_features=attributes.count("out_features"),
        has_bias=attributes.flag("bias", True),
        activation=_activation(
            attributes.take("activation_function", "torch.nn.modules.activation.Tanh"),
            attributes.where,
        ),
    )
    attributes.finish()
    return config


def _classifier_activation(folder: Path | None, attributes: Mapping[str, Any]) -> str:
    """In whichever of the places it is named that successive versions have written; else none."""
    path = folder / "config_sentence_transformers.json" if folder is not None else None
    newest = read_json(path) if path is not None and path.is_file() else {}
    named = (
        newest.get("activation_fn")
        or (attributes.get("sentence_transformers") or {}).get("activation_fn")
        or attributes.get("sbert_ce_default_activation_function")
    )
    return "identity" if named is None else _activation(named, "activation_fn")


def _activation(named: str, where: str) -> str:
    if named not in TORCH_ACTIVATIONS:
        raise ValueError(
            f"{where}: expected the activation {' or '.join(TORCH_ACTIVATIONS)}, got {named!r}; "
            "use a model with one of them"
        )
    return TORCH_ACTIVATIONS[named]
