"""Mistral: Llama without biases, with a sliding window in every layer where the config has one.

Source: Jiang et al. 2023, arXiv:2310.06825.
"""

from jaxengine.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Llama; `ModelConfig.sliding_window` is all that differs."""
