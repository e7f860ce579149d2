"""The streaming helpers, under the name SGLang's users import them by, and nothing else."""

from collections.abc import AsyncIterator
from typing import Any

from jaxengine.engine import Engine, Sampling


def stream_and_merge(llm: Engine, prompt: str, sampling_params: Sampling | None = None) -> str:
    """The whole text of a completion that is streamed meanwhile."""
    merge = _Merge(llm)
    return "".join(
        merge.piece(chunk) for chunk in llm.generate(prompt, sampling_params, stream=True)
    )


async def async_stream_and_merge(
    llm: Engine, prompt: str, sampling_params: Sampling | None = None
) -> AsyncIterator[str]:
    """The text of a completion in pieces that do not overlap, as they come."""
    merge = _Merge(llm)
    stream = await llm.async_generate(prompt, sampling_params, stream=True)
    try:
        async for chunk in stream:
            if piece := merge.piece(chunk):
                yield piece
    finally:
        await stream.aclose()


class _Merge:
    """What each chunk adds to the text so far, whether chunks are cumulative or not."""

    def __init__(self, llm: Engine):
        self._is_delta = llm.server_args.incremental_streaming_output
        self._num_chars = 0

    def piece(self, chunk: dict[str, Any]) -> str:
        text = chunk["text"] if self._is_delta else chunk["text"][self._num_chars :]
        self._num_chars += len(text)
        return text
