"""A list of prompts in, a list of results out: the plainest way to use the engine.

python examples/offline_batch.py [--model-path FOLDER_OR_HUB_ID]
"""

import argparse

import jaxengine

PROMPTS = [
    "The import statement",
    "A dictionary is",
    "The global statement",
    "The with statement is used to",
]

parser = argparse.ArgumentParser(description="Generate for a batch of prompts.")
parser.add_argument("--model-path", help="default: the embedded model")
llm = jaxengine.Engine(model_path=parser.parse_args().model_path)

# One dictionary for all prompts; a list of dictionaries sets each prompt's own.
sampling_params = {"temperature": 0.8, "top_p": 0.95}
outputs = llm.generate(PROMPTS, sampling_params)
for prompt, output in zip(PROMPTS, outputs, strict=True):
    print(f"{prompt!r} goes on:\n{output['text']}\n")

llm.shutdown()
