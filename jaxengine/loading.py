"""From arguments to a model in memory: its files, configuration, tokenizer and parameters.
It does not know what runs the model.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxengine import models, weights
from jaxengine.checkpoint import open_checkpoint, read
from jaxengine.hub import read_json, resolve_model
from jaxengine.models.config import ModelConfig
from jaxengine.models.embedder import EmbedderConfig, embedder_pieces
from jaxengine.models.encoder_config import EncoderConfig
from jaxengine.models.interface import Piece
from jaxengine.models.shapes import SHAPES
from jaxengine.pooling import Embeddings, read_embeddings
from jaxengine.server_args import ServerArgs
from jaxengine.tokenizer import eos_token_ids, load_tokenizer

DTYPES = {"half": "float16", "float": "float32"}  # other names that SGLang takes


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """All of a checkpoint but its weights."""

    folder: Path | None  # None for a built-in shape, which has no files
    config: ModelConfig | EncoderConfig
    embeddings: Embeddings | None  # None: it generates
    tokenizer: Any
    eos_token_ids: frozenset[int]

    @property
    def embedder(self) -> EmbedderConfig | None:
        return self.embeddings and self.embeddings.embedder

    @property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Path of each parameter -> the checkpoint tensors that fill it."""
        added = embedder_pieces(self.embedder) if self.embedder is not None else {}
        return models.checkpoint_pieces(self.config) | added

    @property
    def modules(self) -> list[str]:
        """Folders inside the checkpoint's that have tensors too."""
        return [dense.folder for dense in self.embedder.dense] if self.embedder is not None else []


def find_model(args: ServerArgs) -> FoundModel:
    """The checkpoint that the arguments name; ValueError where there is none, or not all of it."""
    folder, attributes = _files(args)
    attributes = attributes | args.model_overrides
    tokenizer = _tokenizer(args, folder)
    path = folder / "generation_config.json" if folder is not None else None
    generation = read_json(path) if path is not None and path.is_file() else None
    config = _config(args, attributes)
    embeddings = None
    if config.head != "tokens":
        embeddings = read_embeddings(folder, attributes, config)
    return FoundModel(
        folder=folder,
        config=config,
        embeddings=embeddings,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(attributes, generation, tokenizer),
    )


def abstract_model(
    config: ModelConfig | EncoderConfig, dtype: str, embedder: EmbedderConfig | None = None
) -> nnx.Module:
    """The model with shapes in place of parameters."""
    return nnx.eval_shape(lambda: models.build(config, dtype=dtype, embedder=embedder))


def load_parameters(args: ServerArgs, found: FoundModel, abstract: nnx.Module, device: Any) -> Any:
    """The parameters of the abstract model, on `device`."""
    config = found.config
    with jax.default_device(device):
        if args.load_format == "dummy" or found.folder is None:
            return weights.dummy_parameters(abstract, seed=args.random_seed or 0)
        return weights.load_parameters(
            found.folder,
            abstract,
            found.pieces,
            base_prefix=models.base_prefix(config),
            modules=found.modules,
            is_ignorable=lambda name: models.is_ignorable(name, config),
            progress=args.show_progress,
        )


def read_checkpoint(
    args: ServerArgs, model_path: str | None, running: FoundModel
) -> dict[str, np.ndarray]:
    """All tensors of another checkpoint of the running model, on the host.

    Raises: ValueError where there is none, or its configuration makes it another model.
    """
    folder = resolve_model(model_path, download_dir=args.download_dir)
    config = _config(args, read_json(folder / "config.json") | args.model_overrides)
    is_other = {
        name
        for name, value in vars(running.config).items()
        if value != getattr(config, name, None) and name not in ("dtype", "eos_ids", "bos_id")
    }
    if is_other:
        raise ValueError(
            f"{folder} is another model: its config.json differs in {', '.join(sorted(is_other))}; "
            "make a new engine for it"
        )
    with ExitStack() as files:
        tensors = open_checkpoint(folder, files, running.modules)
        return {name: read(tensor) for name, tensor in tensors.items()}


def _config(args: ServerArgs, attributes: Mapping[str, Any]) -> ModelConfig | EncoderConfig:
    config = models.read_config(attributes)
    if args.is_embedding and isinstance(config, ModelConfig) and config.head == "tokens":
        return replace(config, head=None)
    return config


def choose_dtype(args: ServerArgs, config: ModelConfig | EncoderConfig, is_cpu: bool) -> str:
    """The type of weights and activations, in NumPy's spelling."""
    if args.dtype != "auto":
        return DTYPES.get(args.dtype, args.dtype)
    # CPUs compute 16-bit types by way of float32: converting once is faster and no less exact.
    return "float32" if is_cpu else config.dtype


def _files(args: ServerArgs) -> tuple[Path | None, dict[str, Any]]:
    name = args.model_path
    if args.load_format == "dummy" and name in SHAPES and not Path(name).exists():
        return None, SHAPES[name]
    folder = resolve_model(name, revision=args.revision, download_dir=args.download_dir)
    return folder, read_json(folder / "config.json")


def _tokenizer(args: ServerArgs, folder: Path | None) -> Any:
    if args.skip_tokenizer_init:
        return None
    path = args.tokenizer_path or folder
    if path is None:
        raise ValueError(
            f"tokenizer_path: {args.model_path!r} is a built-in shape without a tokenizer; pass "
            "one, or skip_tokenizer_init=True to give and get token ids"
        )
    return load_tokenizer(path, revision=args.revision, download_dir=args.download_dir)
