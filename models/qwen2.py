"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows in some layers if asked.

Source: Yang et al. 2024, arXiv:2407.10671.
"""

from jaxengine.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Llama; `ModelConfig.attention_bias` and `sliding_window` are all that differs."""
