"""The command line: from words to one call each, and from errors to one line and an exit code.
Parsing imports neither jax nor transformers, so that help and mistakes are answered at once."""

import argparse
import os
import shlex
import sys
import time
import typing
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import jaxengine
from jaxengine.arguments import json_object, kind_of, option
from jaxengine.bench import options as bench_options
from jaxengine.sampling_params import SamplingParams
from jaxengine.server_args import ServerArgs

FAILURE, USER_ERROR, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

DESCRIPTION = """\
Generates text with a language model, on an NVIDIA GPU or a CPU.

Without --model it is the small model that comes with the package: it continues
sentences about Python, needs no download, and shows that everything works.
"""

EXAMPLES = """\
examples:
  jaxengine generate "The import statement"
  jaxengine generate --stream --temperature 0 "The global statement"
  jaxengine generate --file prompts.txt --json > completions.jsonl
  jaxengine generate --model Qwen/Qwen2.5-0.5B-Instruct "Paris is" "Rome is"
  jaxengine chat --model Qwen/Qwen2.5-0.5B-Instruct --system "Answer briefly."
  jaxengine bench --shape qwen3-0.6b --reference vllm
  jaxengine info
"""

GENERATE = """\
Continues each prompt. Completions go to stdout, everything else to stderr. Where no
prompt is given, each line of stdin is one. No chat template is applied: see chat.
"""

CHAT = """\
A conversation by way of the model's chat template. /reset forgets it, /exit or Ctrl-D
leaves, Ctrl-C stops an answer.
"""

INFO = "Shows versions, devices, the cache folder, and the sizes of a model without loading it."

COMMON = frozenset(
    "model_path tokenizer_path revision dtype device context_length max_running_requests "
    "mem_fraction_static show_progress".split()
)
OF_A_MODEL = frozenset("model_path revision download_dir json_model_override_args".split())
NOT_HERE = frozenset("incremental_streaming_output skip_tokenizer_init stream_output".split())
"""Arguments of an engine that are no options: the commands show text, and as it grows."""

SAMPLING = {
    "max_new_tokens": "tokens of each completion at most",
    "temperature": "0 takes the likeliest token each time; the higher, the more varied",
    "top_p": "draw from the likeliest tokens that make up this probability",
    "top_k": "draw from this many likeliest tokens; -1: from all",
    "min_p": "drop tokens less likely than this share of the likeliest one",
    "sampling_seed": "the same seed draws the same text",
    "n": "completions of each prompt",
    "stop": "end before this text; may be given several times",
    "stop_token_ids": "end at this token id; may be given several times",
    "stop_regex": "end at a match of this expression; may be given several times",
    "no_stop_trim": "keep the text that ended the completion",
    "ignore_eos": "go on where the model would end",
    "min_new_tokens": "do not end before so many tokens",
    "frequency_penalty": "above 0: avoid a token the more often it was generated",
    "presence_penalty": "above 0: avoid tokens that were generated",
    "repetition_penalty": "above 1: the same, by a factor",
    "logit_bias": "JSON object of token id to what is added to its logit",
    "json_schema": "the completion is JSON that this JSON Schema accepts",
    "regex": "the completion matches this expression as a whole",
    "ebnf": "the completion is what `root ::= ...` of this grammar derives",
    "structural_tag": "JSON object: after some text begins, what follows is of a schema",
    "skip_special_tokens": "leave tokens such as <|im_end|> out of the text",
    "spaces_between_special_tokens": "accepted for SGLang's sake",
}
"""Field of `SamplingParams` -> help of its option."""

TEXTS = {
    "logit_bias": "JSON",
    "json_schema": "JSON",
    "regex": "X",
    "ebnf": "X",
    "structural_tag": "JSON",
}
LISTS = {"stop": str, "stop_token_ids": int, "stop_regex": str}
CHAT_DEFAULTS = {"temperature": 0.7, "max_new_tokens": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (default: the process's) ask for; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(words)
    args.command = shlex.join(["jaxengine", *words])
    try:
        with _short_warnings():
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # What is still buffered would raise again when the interpreter flushes it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (ValueError, TypeError, OSError) as error:
        print(f"jaxengine: error: {error}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        print(f"jaxengine: error: {error}", file=sys.stderr)
        return FAILURE


def _generate(args: argparse.Namespace) -> None:
    server_args = ServerArgs.from_cli_args(args)
    sampling = _sampling(args, server_args.sampling_defaults)
    prompts = _prompts(args)
    from jaxengine.commands import generate

    generate(server_args, prompts, sampling, streams=args.stream, as_json=args.json)


def _chat(args: argparse.Namespace) -> None:
    server_args = ServerArgs.from_cli_args(args)
    sampling = _sampling(args, CHAT_DEFAULTS | server_args.sampling_defaults)
    from jaxengine.commands import chat

    chat(server_args, sampling, system=args.system)


def _info(args: argparse.Namespace) -> None:
    server_args = ServerArgs.from_cli_args(args)
    from jaxengine.info import print_info

    print_info(server_args, as_json=args.json)


def _bench(args: argparse.Namespace) -> None:
    options = bench_options.read(args)  # sets arguments of the engine, too
    server_args = ServerArgs.from_cli_args(args)
    started = time.perf_counter()
    from jaxengine.bench.command import run

    run(server_args, options, import_seconds=time.perf_counter() - started)


def _sampling(args: argparse.Namespace, defaults: Mapping[str, Any]) -> SamplingParams:
    given = {name: value for name, value in vars(args).items() if name in SAMPLING}
    if "logit_bias" in given:
        given["logit_bias"] = json_object("logit_bias", given["logit_bias"])
    return SamplingParams.from_dict({**defaults, **given})


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts given as words, then those of the file; those of stdin if there are no others."""
    prompts = list(args.prompt)
    if args.file is not None:
        prompts += _lines(args.file)
    elif not prompts:
        if sys.stdin.isatty():
            raise ValueError('expected a prompt, as in: jaxengine generate "The import statement"')
        prompts += _lines("-")
    if not prompts:
        raise ValueError(f"expected a prompt per line, got none in {args.file or 'stdin'}")
    return prompts


def _lines(path: str) -> list[str]:
    """The lines of a file (`-` is stdin) that hold anything, without their ends."""
    with nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8") as file:
        return [line.rstrip("\r\n") for line in file if line.strip()]


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows a warning as the line it is, without the place in our source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"jaxengine: warning: {message}", file=sys.stderr
        )
        yield


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**settings, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"jaxengine: error: {message}; see {self.prog} --help\n")


class _EngineOptions:
    """Takes the options of `ServerArgs.add_cli_args` and puts the common ones first."""

    def __init__(self, parser: argparse.ArgumentParser, only: Container[str] | None = None):
        self._only = only
        self._common = parser.add_argument_group("model and engine")
        self._advanced = parser.add_argument_group("advanced")

    def add_argument(self, *options: str, **settings: Any) -> None:
        name = settings.get("dest", "")
        if name in NOT_HERE or (self._only is not None and name not in self._only):
            return
        group = self._common if name in COMMON else self._advanced
        group.add_argument(*options, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxengine", description=DESCRIPTION, epilog=EXAMPLES)
    version = f"jaxengine {jaxengine.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(run=lambda args: print(parser.format_help(), end=""))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_generate(_command(commands, "generate", "continue prompts", GENERATE, "[PROMPT ...] "))
    _add_chat(_command(commands, "chat", "talk with a model", CHAT))
    _add_bench(_command(commands, "bench", "measure speed", bench_options.DESCRIPTION))
    _add_info(_command(commands, "info", "versions, devices, and the sizes of a model", INFO))
    return parser


def _command(
    commands: Any, name: str, help: str, description: str, words: str = ""
) -> argparse.ArgumentParser:
    usage = f"jaxengine {name} {words}[options]"
    return commands.add_parser(name, help=help, description=description, usage=usage)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--file", metavar="PATH", help="more prompts, one per line; - is stdin")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="show text as it is generated")
    form.add_argument("--json", action="store_true", help="a JSON object per completion and line")
    _add_sampling(parser, SAMPLING)
    _add_engine(parser)
    parser.set_defaults(run=_generate)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="instruction at the beginning")
    defaults = "Here the default temperature is 0.7, and an answer may fill the context."
    _add_sampling(parser, SAMPLING.keys() - {"n"}, defaults)
    _add_engine(parser)
    parser.set_defaults(run=_chat)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    bench_options.add_options(parser)
    _add_engine(parser)
    parser.set_defaults(run=_bench, **bench_options.ENGINE)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    _add_engine(parser, only=OF_A_MODEL)
    parser.set_defaults(run=_info)


def _add_engine(parser: argparse.ArgumentParser, only: Container[str] | None = None) -> None:
    ServerArgs.add_cli_args(typing.cast(argparse.ArgumentParser, _EngineOptions(parser, only)))


def _add_sampling(
    parser: argparse.ArgumentParser, names: Container[str], description: str | None = None
) -> None:
    """Options for fields of `SamplingParams`; those not given leave no trace in the namespace."""
    group = parser.add_argument_group("sampling", description)
    hints = typing.get_type_hints(SamplingParams)
    for name in (name for name in SAMPLING if name in names):
        default = SamplingParams.__dataclass_fields__[name].default
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": SAMPLING[name]}
        if name in LISTS:
            settings |= {"action": "append", "type": LISTS[name], "metavar": "X"}
        elif isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif name in TEXTS:
            settings |= {"metavar": TEXTS[name]}
        else:
            settings |= {"type": kind_of(hints[name]), "metavar": "N"}
            if default is not None and description is None:
                settings["help"] += f" (default: {default})"
        group.add_argument(option(name), **settings)
