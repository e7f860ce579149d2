"""Text as it is generated, in two ways: merged into a string, and chunk by chunk.

python examples/offline_streaming.py [--model-path FOLDER_OR_HUB_ID]
"""

import argparse

import jaxengine
from jaxengine.utils import stream_and_merge

PROMPTS = ["The import statement", "A dictionary is"]

parser = argparse.ArgumentParser(description="Stream completions.")
parser.add_argument("--model-path", help="default: the embedded model")
sampling_params = {"temperature": 0.2, "top_p": 0.9}

with jaxengine.Engine(model_path=parser.parse_args().model_path) as llm:
    for prompt in PROMPTS:
        print(f"{prompt!r} goes on:\n{stream_and_merge(llm, prompt, sampling_params)}\n")

    # Each chunk holds the whole text so far; what it adds is what follows the text before.
    print("The global statement", end="")
    num_shown = 0
    for chunk in llm.generate("The global statement", sampling_params, stream=True):
        print(chunk["text"][num_shown:], end="", flush=True)
        num_shown = len(chunk["text"])
    print(f"\n\nIt ended because of {chunk['meta_info']['finish_reason']}.")
