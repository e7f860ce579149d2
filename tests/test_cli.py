import builtins
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxengine import cli, commands, info
from jaxengine.sampling_params import UNAVAILABLE, SamplingParams
from jaxengine.server_args import ServerArgs

ROOT = Path(__file__).parents[1]
SMALL = "--context-length 128 --max-running-requests 2 --chunked-prefill-size 32 --cuda-graph-bs 2"


def result(text: str, reason: dict[str, Any] | None) -> dict[str, Any]:
    counts = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": len(text)}
    return {"text": text, "output_ids": [7], "meta_info": {"finish_reason": reason} | counts}


class FakeEngine:
    """Completes whatever is asked with its texts, and streams the last prompt's first."""

    tokenizer = None

    def __init__(self, texts: Sequence[str] = ()):
        self.texts = list(texts)
        self.asked: list[dict[str, Any]] = []

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"device": "cpu:0", "startup_time": {"compile": 1.5, "total": 2.0}}

    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        *,
        input_ids: Any = None,
        stream=False,
    ) -> Any:
        self.asked.append({"prompt": prompt, "sampling": sampling_params, "input_ids": input_ids})
        if not stream:
            return [result(text, {"type": "stop", "matched": 0}) for text in self.texts]
        return self._chunks(self.texts) if prompt else self._chunks([self.texts.pop(0)])

    def _chunks(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        for end in range(1, max(map(len, texts)) + 1):
            for index in reversed(range(len(texts))):
                if end <= len(texts[index]):
                    is_end = end == len(texts[index])
                    reason = {"type": "length", "length": end} if is_end else None
                    yield result(texts[index][:end], reason) | {"index": index}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(commands, "Engine", lambda server_args: fake)
    return fake


@pytest.fixture
def typing(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has a chat typed in: lines, and exceptions that come instead of one."""
    monkeypatch.setattr(commands, "render_chat", lambda _, messages: messages)
    monkeypatch.setattr(commands, "encode", lambda _, messages, **given: (messages, given))

    def type_in(*lines: Any) -> None:
        remaining = iter([*lines, EOFError()])

        def read(prompt: str) -> str:
            line = next(remaining)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return type_in


def parsed(*words: str) -> Any:
    return cli._parser().parse_args(words)


def run(*words: str, **settings: Any) -> Any:
    command = [sys.executable, "-m", "jaxengine", *words]
    env = os.environ | {"JAXENGINE_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
    return subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, **settings)


def test_every_available_sampling_parameter_has_an_option() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    of_functions = {"logits_processors", "interventions", "custom_params"}  # of a program's own
    others = UNAVAILABLE.keys() | of_functions | {"stream_interval", "group"}
    assert fields - others == cli.SAMPLING.keys()


def test_options_of_sampling_and_of_the_engine_are_told_apart() -> None:
    words = "p q --temperature 0 --stop a --stop b --stop-token-ids 3 --no-skip-special-tokens"
    more = "--ignore-eos --n 2 --page-size 16 --disable-radix-cache --stream-interval 4"
    args = parsed("generate", *words.split(), *more.split(), "--logit-bias", '{"5": -1}')
    assert args.prompt == ["p", "q"]
    assert ServerArgs.from_cli_args(args) == ServerArgs(
        page_size=16, disable_radix_cache=True, stream_interval=4
    )
    assert cli._sampling(args, {}) == SamplingParams(
        temperature=0,
        stop=["a", "b"],
        stop_token_ids=[3],
        skip_special_tokens=False,
        ignore_eos=True,
        n=2,
        logit_bias={5: -1},
    )


def test_sampling_defaults_lie_below_the_options() -> None:
    args = parsed("chat", "--temperature", "0.1", "--preferred-sampling-params", '{"top_k": 5}')
    defaults = cli.CHAT_DEFAULTS | ServerArgs.from_cli_args(args).sampling_defaults
    sampling = cli._sampling(args, defaults)
    assert sampling == SamplingParams(temperature=0.1, top_k=5, max_new_tokens=None)


def test_help_puts_common_options_before_advanced_ones() -> None:
    for command in ("generate", "chat"):
        text = next(iter(cli._parser()._subparsers._group_actions)).choices[command].format_help()  # type: ignore
        assert text.index("--temperature") < text.index("--model-path") < text.index("\nadvanced:")
        assert text.index("\nadvanced:") < text.index("--page-size")
        assert "--tp-size" not in text and "--stream-output" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--temperature", "-1", "p"], "temperature: expected a finite number >= 0"),
        (["generate", "--temperature", "x", "p"], "argument --temperature: invalid float value"),
        (["generate", "--logit-bias", "[1]", "p"], "logit_bias: expected a JSON object"),
        (["generate", "--page-size", "0", "p"], "page_size: expected at least 1, got 0"),
        (["generate", "--tp-size", "2", "p"], "tp_size: expected 1, got 2"),
        (["generate", "--stream", "--json", "p"], "argument --json: not allowed with"),
        (["generate", "--skip-tokenizer-init", "p"], "unrecognized arguments: --skip-tokenizer"),
        (["generate", "--file", "no-such-file"], "No such file or directory: 'no-such-file'"),
        (["generate"], "expected a prompt per line, got none in stdin"),
        (["chat", "--n", "2"], "unrecognized arguments: --n 2"),
        (["speak"], "invalid choice: 'speak'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    try:
        code: Any = cli.main(words)
    except SystemExit as exit:  # argparse's own way out
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("jaxengine: error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("the engine failed"), 1, "jaxengine: error: the engine failed\n"),
        (ValueError("prompt: too long"), 2, "jaxengine: error: prompt: too long\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    engine: FakeEngine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(commands, "Engine", fail)
    assert cli.main(["generate", "p"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with cli._short_warnings():
            warnings.warn("that is ignored", stacklevel=1)
    assert capsys.readouterr().err == "jaxengine: warning: that is ignored\n"


def test_prompts_come_from_words_then_the_file_or_else_from_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("  öne\r\n\n \ntwo ".encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("three\n\nfour\n"))
    assert cli._prompts(parsed("generate", "zero", "--file", str(file))) == [
        "zero",
        "  öne",
        "two ",
    ]
    assert cli._prompts(parsed("generate", "zero")) == ["zero"]
    assert cli._prompts(parsed("generate")) == ["three", "four"]
    assert not sys.stdin.closed


def test_completions_go_to_stdout_and_all_else_to_stderr(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.texts = ["abc"]
    assert cli.main(["generate", "p"]) == 0
    out, err = capsys.readouterr()
    assert out == "abc\n"
    assert "jaxengine: the embedded model on cpu:0, ready after 2.0 s\n" in err
    assert re.search(r"3 tokens in .* s, .* tokens/s; 1 of 3 prompt tokens were cached\n$", err)


def test_several_completions_are_titled_on_stderr(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.texts = ["one", "two", "three", "four"]
    assert cli.main(["generate", "p", "q", "--n", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\nfour\n"
    assert re.findall("--- .*", err) == [
        "--- 1 of 4: p",
        "--- 2 of 4: p",
        "--- 3 of 4: q",
        "--- 4 of 4: q",
    ]


def test_streamed_completions_come_in_order_though_they_grow_side_by_side(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.texts = ["the longest of them", "short", "longer"]
    assert cli.main(["generate", "--stream", "p", "q", "r"]) == 0
    out, err = capsys.readouterr()
    assert out == "the longest of them\nshort\nlonger\n"
    assert re.findall("--- .*", err) == ["--- 1 of 3: p", "--- 2 of 3: q", "--- 3 of 3: r"]
    assert "30 tokens in" in err


def test_json_is_one_object_a_line(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.texts = ["a\nb", "c"]
    assert cli.main(["generate", "--json", "p", "q"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"prompt": "p", **engine.generate(["p"])[0]}
    assert (second["prompt"], second["text"]) == ("q", "c")


def test_a_chat_remembers_and_forgets(
    engine: FakeEngine, typing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.texts = ["Hi.", "Good.", "Yes."]
    typing("Hello", "", " How are you? ", "/reset", "New?", "/exit", "never read")
    assert cli.main(["chat", "--system", "Be brief."]) == 0
    asked = [call["input_ids"][0] for call in engine.asked]
    system = {"role": "system", "content": "Be brief."}
    hello = {"role": "user", "content": "Hello"}
    hi = {"role": "assistant", "content": "Hi."}
    assert asked[0] == [system, hello]
    assert asked[1] == [system, hello, hi, {"role": "user", "content": "How are you?"}]
    assert asked[2] == [system, {"role": "user", "content": "New?"}]
    assert all(call["input_ids"][1] == {"add_special_tokens": False} for call in engine.asked)
    assert capsys.readouterr().out == "Hi.\nGood.\nYes.\n"


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    engine: FakeEngine,
    typing: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []

    class Interrupted:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield result("So f", None)
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append(True)

    streams = iter([Interrupted(), [result("Next.", {"type": "stop", "matched": 0})]])
    asked = []

    def answer(**given: Any) -> Any:
        asked.append(given["input_ids"][0])
        return next(streams)

    monkeypatch.setattr(engine, "generate", answer)
    typing("One?", KeyboardInterrupt(), "Two?")
    assert cli.main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "So f\nNext.\n" and "[stopped]" in err and closed == [True]
    assert [message["content"] for message in asked[1]] == ["One?", "So f", "Two?"]


def test_a_question_that_does_not_fit_is_forgotten_and_explained(
    engine: FakeEngine,
    typing: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def answer(**given: Any) -> Any:
        asked.append(given["input_ids"][0])
        if len(asked) == 1:
            raise ValueError("input_ids: 9 tokens do not fit")
        return [result("Yes.", {"type": "stop", "matched": 0})]

    monkeypatch.setattr(engine, "generate", answer)
    typing("A long one", "A short one?")
    assert cli.main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "Yes.\n" and "[input_ids: 9 tokens do not fit; or forget" in err
    assert asked[1] == [{"role": "user", "content": "A short one?"}]


def test_info_counts_what_a_built_in_shape_would_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--model", "qwen3-8b", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert sections["versions"]["jax"] and sections["devices"]
    model = sections["model"]
    assert model["parameters"] == "8,190,735,360 of bfloat16, 15.3 GiB"
    assert model["kv cache"] == "144.0 KiB a token" and model["chat template"] == "no"


def test_info_shows_what_it_can_before_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--model", "./no/such/folder"]) == 2
    out, err = capsys.readouterr()
    assert "versions\n" in out and "devices\n" in out and "there is no folder" in err


def test_sizes_have_readable_units() -> None:
    sizes = (0, 1023, 1024, 1536 * 2**20, 2**50)
    assert [info._in_units(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "1024.0 TiB",
    ]


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from jaxengine.cli import main; main([]); "
        "print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert "jaxengine chat" in done.stdout and "examples:" in done.stdout


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run(stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_generate_from_a_pipe_with_the_embedded_model() -> None:
    words = ["--max-new-tokens", "8", "--temperature", "0", *SMALL.split(), "--no-show-progress"]
    prompts = "The import statement\nA dictionary is\nThe json module\n"
    done = run("generate", "--stream", *words, stdout=subprocess.PIPE, input=prompts)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert "24 tokens in" in done.stderr and "Traceback" not in done.stderr
