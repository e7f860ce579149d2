"""`engine.tokenizer_manager`, which programs written for SGLang reach into. There is no such part
here: its attributes are the engine's methods by another name."""

import asyncio
from typing import Any


class TokenizerManager:
    """The tokenizer, aborting and pausing of an engine. In place of its `generate_request`, which
    takes an object of SGLang's, call `engine.async_generate`."""

    def __init__(self, engine: Any):
        self._engine = engine

    @property
    def tokenizer(self) -> Any:
        """See `Engine.tokenizer`."""
        return self._engine.tokenizer

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """See `Engine.abort`."""
        self._engine.abort(None if abort_all else rid, abort_all=abort_all)

    async def pause_generation(self, request: Any = None) -> None:
        """See `Engine.pause_generation`; `request` has a `mode`, or it is `abort`."""
        mode = getattr(request, "mode", "abort")
        await asyncio.to_thread(self._engine.pause_generation, mode)

    async def continue_generation(self, request: Any = None) -> None:
        """See `Engine.continue_generation`; `request` has nothing to say."""
        await asyncio.to_thread(self._engine.continue_generation)
