import argparse
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine.server_args import ALIASES, ServerArgs
from jaxengine.sglang_arguments import GROUPS, TABLE, Ignored, Refused

FIELDS = {field.name: field for field in dataclasses.fields(ServerArgs)}
OURS = {"show_progress", "logprobs_mode"}  # and a name of a later SGLang
OURS |= {"incremental_streaming_output"}
SGLANG = set(Path(__file__).with_name("sglang_argument_names.txt").read_text().split())


def _parse(*words: str) -> ServerArgs:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(words))


def test_every_argument_of_sglang_is_a_field_or_in_the_table() -> None:
    assert len(SGLANG) == 328
    assert FIELDS.keys() | TABLE.keys() == SGLANG | OURS


def test_no_argument_is_listed_twice() -> None:
    names = [entry.partition("=")[0] for _, entries in GROUPS for entry in entries.split()]
    assert len(names) == len(set(names))
    assert not FIELDS.keys() & TABLE.keys()
    assert not ALIASES.keys() & SGLANG


def test_every_field_has_a_help_text_and_a_valid_default() -> None:
    assert all(field.metadata["help"] for field in FIELDS.values())
    args = ServerArgs()
    assert args.page_size == 64 and args.enable_mixed_chunk and args.model_path is None


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_default_of_sglang_passes_without_a_word(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (None, *TABLE[name].defaults):
            assert ServerArgs(**{name: value}) == ServerArgs()


@pytest.mark.parametrize("name", sorted(TABLE))
def test_anything_else_is_warned_about_or_refused_with_the_reason(name: str) -> None:
    verdict = TABLE[name]
    if isinstance(verdict, Ignored):
        with pytest.warns(UserWarning, match=f"{name}='something' is ignored: ") as caught:
            assert ServerArgs(**{name: "something"}) == ServerArgs()
        assert len(caught) == 1 and caught[0].filename == __file__  # where it was written
        assert verdict.reason in str(caught[0].message)
    else:
        assert isinstance(verdict, Refused)
        with pytest.raises(ValueError, match=f"{name}: expected .*, got 'something': ") as error:
            ServerArgs(**{name: "something"})
        assert verdict.reason in str(error.value)


def test_tensor_parallelism_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="tp_size: expected 1, got 2: .*one process per GPU"):
        ServerArgs(tp_size=2)


def test_an_empty_value_asks_for_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ServerArgs(lora_paths=[], limit_mm_data_per_request={}, log_requests_target=(), warmups="")


def test_none_stands_for_the_default() -> None:
    assert ServerArgs(page_size=None, log_level=None, model_path=None) == ServerArgs()


def test_an_unknown_name_is_a_type_error_that_suggests_the_closest() -> None:
    with pytest.raises(TypeError, match="'max_running_request' .*mean 'max_running_requests'"):
        ServerArgs(max_running_request=3)
    with pytest.raises(TypeError, match="'xyzzy' is not an argument of the engine$"):
        ServerArgs(xyzzy=1)


def test_later_names_of_sglang_mean_the_same_argument() -> None:
    args = ServerArgs(cuda_graph_max_bs_decode=4, cuda_graph_bs_decode=[1, 4])
    assert args.cuda_graph_max_bs == 4 and args.cuda_graph_bs == (1, 4)
    with pytest.raises(TypeError, match="one argument"):
        ServerArgs(cuda_graph_max_bs_decode=4, cuda_graph_max_bs=4)


def test_arguments_are_frozen_hashable_and_replaceable() -> None:
    args = ServerArgs(cuda_graph_bs=[1, 2])
    assert hash(args) == hash(ServerArgs.from_kwargs({"cuda_graph_bs": (1, 2)}))
    assert dataclasses.replace(args, page_size=16).page_size == 16
    assert repr(args).startswith("ServerArgs(model_path=None")
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.page_size = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_convenient_forms_are_converted() -> None:
    args = ServerArgs(
        model_path=Path("folder"),
        page_size=np.int64(16),
        watchdog_timeout=60,
        json_model_override_args={"rope_theta": 1e6},
        preferred_sampling_params={"top_k": 5},
    )
    assert args.model_path == "folder" and type(args.page_size) is int
    assert args.watchdog_timeout == 60.0
    assert args.model_overrides == {"rope_theta": 1e6} and args.sampling_defaults == {"top_k": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"page_size": 16.5}, "page_size: expected int, got 16.5"),
        ({"page_size": True}, "page_size: expected int, got True"),
        ({"model_path": 3}, "model_path: expected str, got 3"),
        ({"disable_radix_cache": "yes"}, "disable_radix_cache: expected bool, got 'yes'"),
        ({"dtype": "int8"}, "dtype: expected .*bfloat16.*, got 'int8'; quantized"),
        ({"load_format": "pt"}, "load_format: expected .*, got 'pt'; .*save_pretrained"),
        ({"grammar_backend": "xgrammar"}, "grammar_backend: expected auto or llguidance, got 'xgr"),
        (
            dict(
                constrained_json_whitespace_pattern=" ?",
                constrained_json_disable_any_whitespace=True,
            ),
            "constrained_json_whitespace_pattern: expected none, got ' \\?'",
        ),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode: expected auto, got 'slow'"),
        ({"schedule_policy": "dfs-weight"}, "schedule_policy: expected fcfs .*take lpm"),
        (
            {"attention_backend": "fa3"},
            "attention_backend: expected mosaic .*got 'fa3'; leave it out",
        ),
        (
            {"num_continuous_decode_steps": 65},
            "num_continuous_decode_steps: .*page_size = 64, got 65",
        ),
        ({"num_continuous_decode_steps": 0}, "num_continuous_decode_steps: expected at least 1"),
        ({"device": "tpu"}, "device: expected cpu or cuda or gpu, got 'tpu'"),
        ({"log_level": "loud"}, "log_level: expected debug or "),
        ({"mem_fraction_static": 1.0}, "mem_fraction_static: .*between 0 and 1, got 1.0"),
        ({"mem_fraction_static": float("nan")}, "mem_fraction_static: expected a finite number"),
        ({"schedule_conservativeness": -0.1}, "schedule_conservativeness: expected at least 0"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size: expected at least 1, or -1"),
        ({"chunked_prefill_size": -2}, "chunked_prefill_size: expected at least 1, or -1"),
        ({"max_total_tokens": 63}, "max_total_tokens: expected at least one page of 64"),
        ({"cuda_graph_bs": []}, "cuda_graph_bs: expected one or more whole numbers"),
        ({"cuda_graph_bs": [1, 0]}, "cuda_graph_bs: expected at least 1, got 0"),
        ({"cuda_graph_bs": ["1"]}, "cuda_graph_bs: expected int, got '1'"),
        ({"json_model_override_args": "{"}, "json_model_override_args: expected a JSON object"),
        ({"preferred_sampling_params": "[1]"}, "preferred_sampling_params: expected a JSON object"),
        ({"random_seed": -1}, "random_seed: expected at least 0, got -1"),
    ],
)
def test_a_bad_value_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerArgs(**arguments)


@pytest.mark.parametrize("value", [-1, 1, 17, None])
def test_chunked_prefill_may_be_off_or_any_size(value: int | None) -> None:
    assert ServerArgs(chunked_prefill_size=value).chunked_prefill_size == value


def test_command_line_without_options_gives_the_defaults() -> None:
    assert _parse() == ServerArgs()
    assert _parse("--prompt", "not ours") == ServerArgs()


def test_command_line_sets_fields_of_every_kind() -> None:
    args = _parse(
        *("--model", "m", "--page-size", "16", "--mem-fraction-static", "0.5"),
        *("--disable-radix-cache", "--no-enable-mixed-chunk", "--cuda-graph-bs", "1", "8"),
        *("--stream-output", "--cuda-graph-max-bs-decode", "8"),
    )
    assert (args.model_path, args.page_size, args.mem_fraction_static) == ("m", 16, 0.5)
    assert args.disable_radix_cache and not args.enable_mixed_chunk and args.stream_output
    assert args.cuda_graph_bs == (1, 8) and args.cuda_graph_max_bs == 8


def test_command_line_judges_the_arguments_of_sglang_too() -> None:
    assert _parse("--tp-size", "1") == ServerArgs()
    with pytest.raises(ValueError, match="tp_size: expected 1, got 4"):
        _parse("--tp-size", "4")
    with pytest.warns(UserWarning, match="disable_cuda_graph=True is ignored"):
        _parse("--disable-cuda-graph")


def test_command_line_help_shows_our_arguments_only() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    assert "--page-size" in text and "--tp-size" not in text


def test_import_is_light() -> None:
    program = (
        "import sys, jaxengine.server_args; print(sum(m in sys.modules for m in ('jax', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
