"""The streaming helpers: whole texts and pieces, from cumulative chunks and from others."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import jaxengine
from jaxengine.utils import async_stream_and_merge, stream_and_merge

PIECES = ["", "ab", "", "ab", "ab", "c"]  # repeats, which trimming of overlaps would swallow
PARAMS = {"temperature": 0, "max_new_tokens": 12}


class Talker:
    """Has the two methods of `Engine` that the helpers call."""

    def __init__(self, is_delta: bool):
        self.server_args = SimpleNamespace(incremental_streaming_output=is_delta)
        so_far = ["".join(PIECES[: end + 1]) for end in range(len(PIECES))]
        self.texts = PIECES if is_delta else so_far
        self.closed = False

    def generate(self, prompt: str, sampling_params: Any, stream: bool) -> Any:
        return iter([{"text": text} for text in self.texts])

    async def async_generate(self, prompt: str, sampling_params: Any, stream: bool) -> Any:
        return self._chunks()

    async def _chunks(self) -> Any:
        try:
            for text in self.texts:
                yield {"text": text}
        finally:
            self.closed = True


async def pieces(llm: Any, prompt: str = "", params: Any = None) -> list[str]:
    return [piece async for piece in async_stream_and_merge(llm, prompt, params)]


@pytest.mark.parametrize("is_delta", [False, True])
def test_chunks_add_up_to_the_text(is_delta):
    talker: Any = Talker(is_delta)
    assert stream_and_merge(talker, "") == "abababc"
    assert asyncio.run(pieces(talker)) == ["ab", "ab", "ab", "c"]


def test_a_merge_that_is_left_closes_its_stream():
    talker: Any = Talker(False)

    async def leave() -> None:
        merge: Any = async_stream_and_merge(talker, "")
        async for _ in merge:
            break
        await merge.aclose()

    asyncio.run(leave())
    assert talker.closed


def test_with_an_engine_they_give_the_text_of_generate(text_engine):
    text = text_engine.generate("A dictionary is", PARAMS)["text"]
    assert stream_and_merge(text_engine, "A dictionary is", PARAMS) == text
    parts = asyncio.run(pieces(text_engine, "A dictionary is", PARAMS))
    assert "".join(parts) == text


def test_they_are_public():
    assert jaxengine.stream_and_merge is stream_and_merge
    assert jaxengine.async_stream_and_merge is async_stream_and_merge
