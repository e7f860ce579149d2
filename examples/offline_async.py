"""Many coroutines, one engine: their requests run side by side.

python examples/offline_async.py [--model-path FOLDER_OR_HUB_ID]
"""

import argparse
import asyncio

import jaxengine

PROMPTS = [
    "The import statement",
    "A dictionary is",
    "The global statement",
    "The with statement is used to",
]


async def describe(llm: jaxengine.Engine, prompt: str) -> str:
    output = await llm.async_generate(prompt, {"temperature": 0.8, "top_p": 0.95})
    return f"{prompt!r} goes on:\n{output['text']}\n"


async def main(llm: jaxengine.Engine) -> None:
    for task in asyncio.as_completed([describe(llm, prompt) for prompt in PROMPTS]):
        print(await task)

    # A list works too: one call, results in the order of the prompts.
    outputs = await llm.async_generate(PROMPTS, {"temperature": 0, "max_new_tokens": 16})
    print([output["text"] for output in outputs])


parser = argparse.ArgumentParser(description="Generate from coroutines.")
parser.add_argument("--model-path", help="default: the embedded model")
with jaxengine.Engine(model_path=parser.parse_args().model_path) as engine:
    asyncio.run(main(engine))
