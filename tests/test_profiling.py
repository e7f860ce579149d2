"""Traces of steps: where they land, what a launch is called in them, when they begin and end."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from engines import InBackground

from jaxengine import Engine
from jaxengine.profiling import Profiler, TraceOptions

PROMPT = "The import statement"
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}


def launches(file: str | Path, name: str | None = None) -> list[dict[str, Any]]:
    """The arguments of the launches in a trace."""
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    names = ("decode", "extend") if name is None else (name,)
    return [event["args"] for event in events if event.get("name") in names]


def test_a_trace_has_every_launch_by_name_and_size(text_engine, tmp_path):
    text_engine.flush_cache()
    assert text_engine.start_profile(str(tmp_path)) == str(tmp_path)
    text_engine.generate([PROMPT] * 3, GREEDY)
    file = text_engine.stop_profile()
    assert Path(file).is_relative_to(tmp_path / "plugins" / "profile")
    assert list(Path(file).parent.glob("*.xplane.pb")), "for XProf"
    [prompt] = launches(file, "extend")
    assert (prompt["rows"], prompt["tokens"], prompt["steps"]) == ("3", "9", "1")
    decoded = launches(file, "decode")
    assert [(each["rows"], each["tokens"]) for each in decoded] == [("3", "3")] * 11
    numbers = [int(each["step_num"]) for each in [prompt, *decoded]]
    assert numbers == list(range(numbers[0], numbers[0] + 12))


def test_it_ends_by_itself_after_so_many_steps(text_engine, tmp_path):
    text_engine.start_profile(str(tmp_path), num_steps=5)
    text_engine.generate(PROMPT, LONG)
    [file] = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert len(launches(file)) in (5, 6), "one more may be under way"
    assert text_engine.stop_profile() == str(file)
    with pytest.raises(ValueError, match="stop_profile: nothing is traced"):
        text_engine.stop_profile()
    assert text_engine._loop.after_step == [text_engine._loop.scheduler.check_integrity]


def test_it_begins_at_the_step_that_was_asked_for(text_engine, tmp_path):
    first = text_engine.get_server_info()["num_steps"] + 20
    text_engine.start_profile(str(tmp_path), start_step=first, num_steps=3)
    with pytest.raises(ValueError, match="is under way"):
        text_engine.start_profile(str(tmp_path))
    text_engine.generate(PROMPT, GREEDY)
    assert not list(tmp_path.iterdir())
    text_engine.generate(PROMPT, GREEDY)
    assert 3 <= len(launches(text_engine.stop_profile(), "decode")) <= 4


def test_a_step_that_never_came(text_engine, tmp_path):
    text_engine.start_profile(str(tmp_path), start_step=10**9)
    with pytest.raises(ValueError, match="nothing was traced; start_step = 1000000000 was not"):
        text_engine.stop_profile()


def test_activities_and_python_calls(text_engine, tmp_path):
    sizes = {}
    for activities, with_stack in ((["GPU"], None), (None, None), (["CPU", "GPU"], True)):
        text_engine.start_profile(str(tmp_path), activities=activities, with_stack=with_stack)
        text_engine.generate(PROMPT, GREEDY)
        file = text_engine.stop_profile()
        assert len(launches(file)) == 12
        sizes[with_stack, activities is None] = Path(file).stat().st_size
    assert sizes[True, False] > sizes[None, True], "Python's calls take room"
    with pytest.warns(UserWarning, match="a GPU is traced in any case"):
        text_engine.start_profile(str(tmp_path), activities=["CPU"])
    text_engine.stop_profile()


def test_the_default_folder_is_new_and_the_user_s_own(text_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = []
    for _ in range(2):
        folders.append(Path(text_engine.start_profile()))
        text_engine.stop_profile()
    assert {*folders} == {*tmp_path.iterdir()} and len({*folders}) == 2
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in folders)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps: expected a whole number above 0"),
        ({"start_step": 1.5}, ValueError, "start_step: expected a whole number above 0"),
        ({"activities": ["MEM"]}, ValueError, "activities: expected CPU, GPU or both"),
        ({"activities": ["CPU", "RPD"]}, ValueError, "activities: expected CPU, GPU or both"),
        ({"activities": []}, ValueError, "activities: expected CPU, GPU or both"),
        ({"profile_by_stage": True}, ValueError, "profile_by_stage: .*named decode and extend"),
        ({"profile_stages": ["decode"]}, ValueError, "profile_stages: .*named decode"),
        ({"profile_prefix": "x"}, ValueError, "profile_prefix: .*give a folder as output_dir"),
        ({"outputdir": "x"}, TypeError, "unexpected argument 'outputdir'"),
    ],
)
def test_arguments_that_cannot_be_had(text_engine, arguments, error, message):
    with pytest.raises(error, match=message):
        text_engine.start_profile(**arguments)
    with pytest.raises(ValueError, match="nothing is traced"):
        text_engine.stop_profile()


def test_sglang_s_defaults_may_be_written_out(text_engine, tmp_path):
    text_engine.start_profile(
        output_dir=str(tmp_path),
        start_step=None,
        num_steps=None,
        activities=["CPU", "GPU"],
        with_stack=False,
        record_shapes=True,
        profile_by_stage=False,
        merge_profiles=True,
        profile_prefix=None,
        profile_stages=None,
    )
    text_engine.generate(PROMPT, GREEDY)
    assert launches(text_engine.stop_profile())


def test_a_trace_of_somebody_else_is_respected(text_engine, tmp_path):
    with jax.profiler.trace(str(tmp_path / "own"), create_perfetto_trace=True):
        with pytest.raises(ValueError, match="this process is traced already"):
            text_engine.start_profile(str(tmp_path))
        text_engine.generate(PROMPT, GREEDY)
    [file] = tmp_path.glob("own/plugins/profile/*/perfetto_trace.json.gz")
    assert len(launches(file)) == 12, "launches have their names in any trace"


def test_a_shutdown_writes_the_trace(make_engine, tmp_path):
    engine: Engine = make_engine()
    engine.start_profile(str(tmp_path / "first"))
    engine.generate(input_ids=[1, 2], sampling_params=GREEDY)
    engine.shutdown()
    [file] = tmp_path.glob("first/plugins/profile/*/perfetto_trace.json.gz")
    assert len(launches(file)) == 12
    other = make_engine()
    other.start_profile(str(tmp_path / "second"))
    assert other.stop_profile()


def test_what_goes_wrong_between_steps_is_told_by_stop_and_ends_no_request(
    text_engine, tmp_path, monkeypatch
):
    """Somebody else's trace stands where this one was to begin."""
    first = text_engine.get_server_info()["num_steps"] + 3
    text_engine.start_profile(str(tmp_path), start_step=first)
    with jax.profiler.trace(str(tmp_path / "own")):
        assert len(text_engine.generate(PROMPT, GREEDY)["output_ids"]) == 12
    with pytest.raises(ValueError, match="this process is traced already"):
        text_engine.stop_profile()
    assert len(text_engine._loop.after_step) == 1


def test_a_trace_may_begin_and_end_under_load(text_engine, tmp_path):
    expected = text_engine.generate(PROMPT, LONG)["output_ids"]
    call = InBackground(text_engine, lambda: text_engine.generate(PROMPT, LONG))
    text_engine.start_profile(str(tmp_path))
    file = text_engine.stop_profile()
    assert Path(file).is_file() and call.join().result["output_ids"] == expected


def test_steps_of_one_launch_count_each(tmp_path):
    """A loop whose launches have four steps."""

    class Steps:
        num_steps = 0
        after_step: list = []

        def launch(self) -> None:
            self.num_steps += 4
            for look in tuple(self.after_step):
                look()

    steps, profiler = Steps(), Profiler()
    profiler.start(steps, TraceOptions(folder=tmp_path, first_step=5, num_steps=6))
    began_and_ended = []
    for _ in range(6):
        steps.launch()
        began_and_ended.append((bool(list(tmp_path.iterdir())), bool(steps.after_step)))
    assert began_and_ended.index((True, False)) == 3, "begun behind step 8, ended behind 16"
    assert profiler.stop().is_file()
