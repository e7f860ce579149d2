"""Qwen3: Llama whose queries and keys are normalised head by head before they are rotated.

Source: Yang et al. 2025, arXiv:2505.09388.
"""

from jaxengine.models.attention import HeadNorms
from jaxengine.models.config import ModelConfig
from jaxengine.models.interface import Piece
from jaxengine.models.layers import Parameters
from jaxengine.models.llama import Attention, LlamaForCausalLM


class Qwen3Attention(Attention):
    """Llama's attention with QK-norm."""

    def __init__(self, config: ModelConfig, window: int | None, new: Parameters):
        super().__init__(config, window, new)
        self.eps = config.rms_norm_eps
        self.q_norm = new.scale(head=config.head_size)
        self.k_norm = new.scale(head=config.head_size)

    def head_norms(self) -> HeadNorms:
        return HeadNorms(self.q_norm[...], self.k_norm[...], self.eps)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama with QK-norm."""

    attention_class = Qwen3Attention

    @classmethod
    def layer_pieces(cls, config: ModelConfig, prefix: str) -> dict[str, tuple[Piece, ...]]:
        return super().layer_pieces(config, prefix) | {
            "attention.q_norm": (Piece(f"{prefix}.self_attn.q_norm.weight"),),
            "attention.k_norm": (Piece(f"{prefix}.self_attn.k_norm.weight"),),
        }
