"""Streams in coroutines: pieces of text that do not overlap, as they come.

python examples/offline_async_streaming.py [--model-path FOLDER_OR_HUB_ID]
"""

import argparse
import asyncio

import jaxengine
from jaxengine.utils import async_stream_and_merge

PROMPTS = ["The import statement", "A dictionary is"]
SAMPLING = {"temperature": 0.2, "top_p": 0.9}


async def main(llm: jaxengine.Engine) -> None:
    for prompt in PROMPTS:
        print(f"{prompt!r} goes on:")
        async for piece in async_stream_and_merge(llm, prompt, SAMPLING):
            print(piece, end="", flush=True)
        print("\n")

    # Two streams at a time. `async_generate` is awaited first: that is when mistakes are raised.
    async def count_chunks(prompt: str) -> int:
        stream = await llm.async_generate(prompt, SAMPLING, stream=True)
        return len([chunk async for chunk in stream])

    print("chunks of each:", await asyncio.gather(*map(count_chunks, PROMPTS)))


parser = argparse.ArgumentParser(description="Stream from coroutines.")
parser.add_argument("--model-path", help="default: the embedded model")
with jaxengine.Engine(model_path=parser.parse_args().model_path) as engine:
    asyncio.run(main(engine))
