"""What `make demo` runs: a model continues sentences, answers a question, and is timed.

python examples/demo.py [--model-path FOLDER_OR_HUB_ID]
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax

import jaxengine
from jaxengine.config import configure_jax
from jaxengine.tokenizer import render_chat

PROMPTS = ["The import statement", "A dictionary is", "The with statement is used to"]
QUESTION = "What is the json module?"
BATCH = 32
GREEDY = {"temperature": 0, "max_new_tokens": 64}


def show(llm: jaxengine.Engine, prompt: str, heading: str) -> None:
    """Prints a completion as it grows."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{heading}{plain}", end="", flush=True)
    num_shown = 0
    for chunk in llm.generate(prompt, GREEDY, stream=True):
        print(chunk["text"][num_shown:], end="", flush=True)
        num_shown = len(chunk["text"])
    print()


def measure(llm: jaxengine.Engine) -> str:
    """The speed of a batch, in words."""
    started = time.perf_counter()
    outputs = llm.generate(PROMPTS[:1] * BATCH, {"temperature": 0.8, "max_new_tokens": 128})
    seconds = time.perf_counter() - started
    num_tokens = sum(output["meta_info"]["completion_tokens"] for output in outputs)
    speed = num_tokens / seconds
    return f"{BATCH} completions at once: {num_tokens} tokens in {seconds:.2f} s, {speed:.0f} tok/s"


def command() -> str:
    """How the command `jaxengine` is called from here."""
    script = Path(sys.executable).with_name("jaxengine")
    if script.exists():
        return os.path.relpath(script) if Path.cwd() in script.parents else str(script)
    return f"{Path(sys.executable).name} -m jaxengine"


parser = argparse.ArgumentParser(description="Show what the engine does.")
parser.add_argument("--model-path", help="default: the embedded model")
model_path = parser.parse_args().model_path

configure_jax()  # before the first look at the devices; the engine does it otherwise
device = jax.devices()[0]
name = model_path or "the embedded model"
print(f"jaxengine {jaxengine.__version__}: loading {name} on {device.device_kind} ({device})")

# Smaller than the defaults: fewer steps to compile, so that the first start is short.
engine = jaxengine.Engine(model_path=model_path, max_running_requests=32, chunked_prefill_size=512)
with engine as llm:
    for prompt in PROMPTS:
        show(llm, prompt, heading=prompt)
    if llm.tokenizer.chat_template:
        chat = render_chat(llm.tokenizer, [{"role": "user", "content": QUESTION}])
        show(llm, chat, heading=f"You: {QUESTION}\nModel: ")
    print(f"\n{measure(llm)}")

print(f"""
What to type next:
  {command()} chat                                       talk with this model
  {command()} chat --model Qwen/Qwen2.5-0.5B-Instruct    or another: a name on the hub, a folder
  {command()} generate --stream "The global statement"   continue a text; see --help
The programs in examples/ call the engine from Python; README.md tells the rest.""")
