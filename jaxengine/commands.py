"""What the commands `generate` and `chat` do: run an engine, show its text on stdout and everything
else on stderr. They know no options."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from jaxengine.engine import Engine
from jaxengine.sampling_params import SamplingParams
from jaxengine.server_args import ServerArgs
from jaxengine.tokenizer import encode, render_chat

Result = Mapping[str, Any]
Messages = list[dict[str, str]]


def generate(
    args: ServerArgs,
    prompts: Sequence[str],
    sampling: SamplingParams,
    *,
    streams: bool = False,
    as_json: bool = False,
) -> None:
    """Prints the completions of all prompts, in order; with `streams`, as they grow."""
    asked = [prompt for prompt in prompts for _ in range(sampling.n)]
    with _engine(args) as engine:
        started = time.perf_counter()
        if streams:
            chunks: Any = engine.generate(list(prompts), sampling, stream=True)
            results = print_stream(chunks, asked)
        else:
            results: Any = engine.generate(list(prompts), sampling)
            for index, result in enumerate(results):
                if as_json:
                    line = {"prompt": asked[index], **result}
                    print(json.dumps(line, ensure_ascii=False), flush=True)
                else:
                    _title(asked, index)
                    print(result["text"], flush=True)
        _note(f"jaxengine: {summary(results, time.perf_counter() - started)}")


def print_stream(chunks: Iterable[Result], asked: Sequence[str]) -> list[Result]:
    """Prints streamed completions in order, the first unfinished one live; returns the last chunks.

    The others grow meanwhile: they are generated side by side all the same.
    """
    results: list[Result] = [{"text": "", "meta_info": {"finish_reason": None}} for _ in asked]
    current, num_shown = 0, 0
    _title(asked, current)
    for chunk in chunks:
        results[chunk["index"]] = chunk
        while current < len(asked):
            text = results[current]["text"]
            print(text[num_shown:], end="", flush=True)
            num_shown = len(text)
            if results[current]["meta_info"]["finish_reason"] is None:
                break
            print(flush=True)
            current, num_shown = current + 1, 0
            _title(asked, current)
    return results


def chat(args: ServerArgs, sampling: SamplingParams, *, system: str | None = None) -> None:
    """A conversation on the terminal, to its end."""
    beginning = [{"role": "system", "content": system}] if system else []
    sampling = dataclasses.replace(sampling, n=1)
    with _engine(args) as engine:
        render_chat(engine.tokenizer, [*beginning, {"role": "user", "content": "Hello"}])
        _note("Type a message. /reset forgets the conversation; /exit or Ctrl-D leaves.")
        messages = list(beginning)
        for said in _typed():
            if said == "/reset":
                messages = list(beginning)
                _note("[forgotten]")
            else:
                messages = _turn(engine, sampling, [*messages, {"role": "user", "content": said}])


def summary(results: Sequence[Result], seconds: float) -> str:
    """Counts and speed of finished requests."""
    totals = {
        name: sum(result["meta_info"].get(name, 0) for result in results)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    }
    speed = totals["completion_tokens"] / seconds if seconds > 0 else 0.0
    return (
        f"{totals['completion_tokens']} tokens in {seconds:.2f} s, {speed:.1f} tokens/s; "
        f"{totals['cached_tokens']} of {totals['prompt_tokens']} prompt tokens were cached"
    )


def _turn(engine: Engine, sampling: SamplingParams, messages: Messages) -> Messages:
    """The conversation with its answer, as far as that got; without the question if it had none."""
    # The template has written the special tokens already, so the text is not tokenised as a prompt.
    text = render_chat(engine.tokenizer, messages)
    ids = encode(engine.tokenizer, text, add_special_tokens=False)
    started = time.perf_counter()
    try:
        chunk = _print_answer(engine.generate(input_ids=ids, sampling_params=sampling, stream=True))
    except ValueError as error:
        _note(f"[{error}; or forget the conversation with /reset]")
        return messages[:-1]
    if chunk is None:
        return messages[:-1]
    _note(f"[{summary([chunk], time.perf_counter() - started)}]")
    return [*messages, {"role": "assistant", "content": chunk["text"]}]


def _print_answer(stream: Any) -> Result | None:
    """The last chunk of an answer that was printed as it came; Ctrl-C ends the answer."""
    chunk, num_shown = None, 0
    try:
        for chunk in stream:
            print(chunk["text"][num_shown:], end="", flush=True)
            num_shown = len(chunk["text"])
    except KeyboardInterrupt:
        stream.close()
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    return chunk


def _typed() -> Iterator[str]:
    """What is typed, line by line, until /exit or the end."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and history
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                _note("")  # ends the line of the prompt
            return
        except KeyboardInterrupt:
            _note("\n[/exit or Ctrl-D leaves]")
            continue
        if said == "/exit":
            return
        if said:
            yield said


@contextmanager
def _engine(args: ServerArgs) -> Iterator[Engine]:
    with Engine(server_args=args) as engine:
        info = engine.get_server_info()
        seconds = info["startup_time"]["total"]
        name = args.model_path or "the embedded model"
        _note(f"jaxengine: {name} on {info['device']}, ready after {seconds:.1f} s")
        yield engine


def _title(asked: Sequence[str], index: int) -> None:
    """Says on a terminal which completion follows; what is piped on holds nothing but those."""
    if index < len(asked) > 1:
        _note(f"--- {index + 1} of {len(asked)}: {asked[index]}")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
