"""jaxengine: an LLM inference engine in JAX for NVIDIA GPUs, with SGLang's offline `Engine` API.

from jaxengine import Engine

with Engine() as engine:
    print(engine.generate("The import statement", {"max_new_tokens": 32})["text"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxengine.version import __version__

if TYPE_CHECKING:
    from jaxengine.engine import Engine
    from jaxengine.logit_processor import CustomLogitProcessor
    from jaxengine.sampling.extensions import Intervention, LogitsProcessor, Sampler
    from jaxengine.sampling_params import SamplingParams
    from jaxengine.server_args import ServerArgs
    from jaxengine.utils import async_stream_and_merge, stream_and_merge

HOMES = {
    "CustomLogitProcessor": "jaxengine.logit_processor",
    "Engine": "jaxengine.engine",
    "Intervention": "jaxengine.sampling.extensions",
    "LogitsProcessor": "jaxengine.sampling.extensions",
    "Sampler": "jaxengine.sampling.extensions",
    "SamplingParams": "jaxengine.sampling_params",
    "ServerArgs": "jaxengine.server_args",
    "async_stream_and_merge": "jaxengine.utils",
    "stream_and_merge": "jaxengine.utils",
}

__all__ = [
    "CustomLogitProcessor",
    "Engine",
    "Intervention",
    "LogitsProcessor",
    "Sampler",
    "SamplingParams",
    "ServerArgs",
    "__version__",
    "async_stream_and_merge",
    "stream_and_merge",
]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: `import jaxengine` alone loads nothing
    heavy."""
    if name not in HOMES:
        raise AttributeError(f"module 'jaxengine' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
