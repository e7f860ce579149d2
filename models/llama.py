"""Llama: the dense decoder, and the file to read first; the other families are variations of it.
It knows what a layer computes, not how attention finds its keys or who loads the weights.

Source: Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxengine.models.attention import HeadNorms, attend
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import Batch, KVCache, LayerCache, Piece
from jaxengine.models.layers import Norm, Parameters, gated, linear, project, rms_norm
from jaxengine.models.rope import Rotation, rotation
from jaxengine.models.taps import Taps
from jaxengine.pallas_kernels.dispatch import XLA, Kernels

LayerTap = Callable[[str, Float[Array, "T D"]], Float[Array, "T D"]]
"""`Taps` for one layer: a point and a value to what goes on instead."""


class Attention(nnx.Module):
    """Grouped-query attention. `qkv` holds, for each kv head, its G query heads, then k, then v."""

    def __init__(self, config: ModelConfig, window: int | None, new: Parameters):
        K, G, H, D = config.num_kv_heads, config.group_size, config.head_size, config.hidden_size
        self.window = window
        self.qkv = new.weight(kv_heads=K, qkv=G + 2, head=H, embed=D)
        self.qkv_bias = new.bias(kv_heads=K, qkv=G + 2, head=H) if config.attention_bias else None
        self.out = new.weight(embed=D, heads=K * G, head=H)
        self.out_bias = new.bias(embed=D) if config.output_bias else None

    def head_norms(self) -> HeadNorms | None:
        """How queries and keys are normalised before they are rotated; by default, not at all."""
        return None

    def __call__(
        self,
        x: Float[Array, "T D"],
        norm: Norm,
        by: Rotation,
        cache: LayerCache | None,
        batch: Batch,
        kernels: Kernels,
        tap: LayerTap | None,
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        T, (K, _, H, _) = len(x), self.qkv.shape
        qkv = linear(x, self.qkv, norm=norm, bias=self.qkv_bias, kernels=kernels)
        mixed, cache = attend(
            qkv.reshape(T, K, -1, H),
            by,
            self.head_norms(),
            cache,
            batch,
            scale=H**-0.5,
            window=self.window,
            kernels=kernels,
        )
        mixed = mixed.reshape(T, -1)
        how = dict(bias=self.out_bias, kernels=kernels)
        return _added(x, tap, "attention_output", partial(linear, mixed, self.out, **how)), cache


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, new: Parameters):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up = new.weight(gate_up=2, mlp=F, embed=D)
        self.gate_up_bias = new.bias(gate_up=2, mlp=F) if config.mlp_bias else None
        self.down = new.weight(embed=D, mlp=F)
        self.down_bias = new.bias(embed=D) if config.mlp_bias else None

    def __call__(
        self, x: Float[Array, "T D"], norm: Norm, kernels: Kernels, tap: LayerTap | None
    ) -> Float[Array, "T D"]:
        hidden = gated(x, self.gate_up, norm=norm, bias=self.gate_up_bias, kernels=kernels)
        how = dict(bias=self.down_bias, kernels=kernels)
        return _added(x, tap, "mlp_output", partial(linear, hidden, self.down, **how))


class Layer(nnx.Module):
    """Attention and MLP, each of the normed stream and added to it."""

    def __init__(self, config: ModelConfig, attention: Attention, new: Parameters):
        self.eps = config.rms_norm_eps
        self.input_layernorm = new.scale(embed=config.hidden_size)
        self.attention = attention
        self.post_attention_layernorm = new.scale(embed=config.hidden_size)
        self.mlp = MLP(config, new)

    def __call__(
        self,
        x: Float[Array, "T D"],
        by: Rotation,
        cache: LayerCache | None,
        batch: Batch,
        kernels: Kernels,
        tap: LayerTap | None = None,
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        norm = Norm(self.input_layernorm[...], self.eps)
        x, cache = self.attention(x, norm, by, cache, batch, kernels, tap)
        return self.mlp(x, Norm(self.post_attention_layernorm[...], self.eps), kernels, tap), cache


class LlamaForCausalLM(nnx.Module):
    """The decoder, with the head that its config has. Implements `interface.Model`."""

    attention_class = Attention
    base_prefix = "model."

    def __init__(self, config: ModelConfig, new: Parameters):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = new.weight(vocab=V, embed=D)
        self.layers = nnx.List(
            Layer(config, self.attention_class(config, window, new), new)
            for window in config.sliding_window
        )
        self.norm = new.scale(embed=D)
        self.lm_head = new.weight(vocab=V, embed=D) if config.has_lm_head else None
        self.score = new.weight(labels=config.num_labels, embed=D) if config.num_labels else None

    def __call__(
        self,
        batch: Batch,
        cache: KVCache | None,
        kernels: Kernels = XLA,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "T D"], KVCache | None]:
        taps = taps or Taps()
        # An id outside the vocabulary gives NaN, which sampling reports, instead of another token.
        x = self.embed_tokens[...].at[batch.tokens].get(mode="fill", wrap_negative_indices=False)
        x = taps("embedding", None, x)
        by = rotation(batch, self.config.rope, self.config.head_size, x.dtype)
        layer_caches = []
        for index, layer in enumerate(self.layers):
            x = taps("block_input", index, x)
            layer_cache = None if cache is None else cache[index]
            if taps.look_inside(index):  # what it reads is of this trace: not to be traced apart
                tap = lambda point, value, index=index: taps(point, index, value)
                x, layer_cache = layer(x, by, layer_cache, batch, kernels, tap)
            else:
                x, layer_cache = _run(kernels, *nnx.split(layer), x, by, layer_cache, batch)
            layer_caches.append(layer_cache)
        x = taps("final_norm", None, rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps))
        return x, cache and tuple(layer_caches)

    @property
    def head(self) -> nnx.Param:
        if self.score is not None:
            return self.score
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        return project(hidden, self.head)

    @classmethod
    def checkpoint_pieces(cls, config: ModelConfig) -> dict[str, tuple[Piece, ...]]:
        """Path of each parameter -> the checkpoint tensors that fill it."""
        pieces: dict[str, tuple[Piece, ...]] = {
            "embed_tokens": (Piece("model.embed_tokens.weight"),),
            "norm": (Piece("model.norm.weight"),),
        }
        if config.has_lm_head:
            pieces["lm_head"] = (Piece("lm_head.weight"),)
        if config.num_labels:
            pieces["score"] = (Piece("score.weight"),)
        for layer in range(config.num_layers):
            for path, parts in cls.layer_pieces(config, f"model.layers.{layer}").items():
                pieces[f"layers.{layer}.{path}"] = parts
        return pieces

    @classmethod
    def layer_pieces(cls, config: ModelConfig, prefix: str) -> dict[str, tuple[Piece, ...]]:
        """The same for one layer, whose tensors' names begin with `prefix`."""
        attention, mlp, G = f"{prefix}.self_attn", f"{prefix}.mlp", config.group_size
        qkv = (("q_proj", np.s_[:, :G]), ("k_proj", np.s_[:, G]), ("v_proj", np.s_[:, G + 1]))
        gate_up = (("gate_proj", 0), ("up_proj", 1))
        pieces = {
            "input_layernorm": (Piece(f"{prefix}.input_layernorm.weight"),),
            "attention.qkv": tuple(Piece(f"{attention}.{n}.weight", index) for n, index in qkv),
            "attention.out": (Piece(f"{attention}.o_proj.weight"),),
            "post_attention_layernorm": (Piece(f"{prefix}.post_attention_layernorm.weight"),),
            "mlp.gate_up": tuple(Piece(f"{mlp}.{n}.weight", index) for n, index in gate_up),
            "mlp.down": (Piece(f"{mlp}.down_proj.weight"),),
        }
        if config.attention_bias:
            pieces["attention.qkv_bias"] = tuple(Piece(f"{attention}.{n}.bias", i) for n, i in qkv)
        if config.output_bias:
            pieces["attention.out_bias"] = (Piece(f"{attention}.o_proj.bias"),)
        if config.mlp_bias:
            pieces["mlp.gate_up_bias"] = tuple(Piece(f"{mlp}.{n}.bias", i) for n, i in gate_up)
            pieces["mlp.down_bias"] = (Piece(f"{mlp}.down_proj.bias"),)
        return pieces

    @staticmethod
    def is_ignorable(name: str, config: ModelConfig) -> bool:
        """Whether a checkpoint tensor may be there without filling anything."""
        unused_head = name == "lm_head.weight" and not config.has_lm_head
        return unused_head or name.endswith("rotary_emb.inv_freq")


def _added(
    x: Float[Array, "T D"],
    tap: LayerTap | None,
    point: str,
    product: Callable[..., Float[Array, "T D"]],
) -> Float[Array, "T D"]:
    """The stream and a product, which may be one kernel where nobody looks in between."""
    return product(residual=x) if tap is None else x + tap(point, product())


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    kernels: Kernels,
    structure: nnx.GraphDef,
    parameters: PyTree[Array],
    x: Float[Array, "T D"],
    by: Rotation,
    cache: LayerCache | None,
    batch: Batch,
) -> tuple[Float[Array, "T D"], LayerCache | None]:
    """One layer. Layers of equal structure are traced and lowered once, however many there are."""
    return nnx.merge(structure, parameters)(x, by, cache, batch, kernels)
