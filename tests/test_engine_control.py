"""What an engine is asked and told besides generating: information, pauses, remote calls, and what
SGLang's programs reach into it for."""

import asyncio
import gc
import json
import logging
import threading
import time
from types import SimpleNamespace

import pytest
from engines import InBackground, num_unfinished, settle

from jaxengine import __version__

PROMPT = "The import statement"
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}

# Order


def test_of_prompts_that_come_at_once_those_with_the_longest_output_begin_first(text_engine):
    runner = text_engine._loop.runner
    submit, begun = runner.submit, []

    def watching(plan, packed):
        begun.extend(request.rid for request in plan.admitted)
        return submit(plan, packed)

    runner.submit = watching
    lengths = [2, 9, 4, 9]
    try:
        results = text_engine.generate(
            input_ids=[[1, 2, index] for index in range(4)],
            sampling_params=[GREEDY | {"max_new_tokens": length} for length in lengths],
            rid=["a", "b", "c", "d"],
        )
    finally:
        runner.submit = submit
    assert begun == ["b", "d", "c", "a"]
    assert [len(result["output_ids"]) for result in results] == lengths


# Pauses


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_token(text_engine, mode):
    expected = text_engine.generate(PROMPT, LONG)["output_ids"]
    stream = text_engine.generate(PROMPT, LONG, stream=True)
    next(stream)
    text_engine.pause_generation(mode)
    settle(text_engine)
    loop = text_engine._loop
    before = loop.num_steps
    call = InBackground(text_engine, lambda: text_engine.generate(PROMPT, GREEDY))
    time.sleep(0.1)
    state = text_engine.get_server_info()["internal_states"][0]
    assert loop.num_steps == before and state["is_paused"] and num_unfinished(text_engine) == 2
    assert not text_engine.flush_cache().success
    assert loop.scheduler.num_waiting == (1 if mode == "in_place" else 2)
    text_engine.continue_generation()
    last = list(stream)[-1]
    assert last["output_ids"] == expected
    assert last["meta_info"]["total_retractions"] == (mode == "retract")
    assert call.join().result["output_ids"] == expected[:12]


def test_a_pause_that_aborts_and_what_is_asked_meanwhile(text_engine):
    call = InBackground(text_engine, lambda: text_engine.generate(PROMPT, LONG))
    text_engine.pause_generation()
    reason = call.join().result["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and reason["message"] == "generation was paused"
    assert text_engine.flush_cache().success, "nothing is unfinished"
    later = InBackground(text_engine, lambda: text_engine.generate(PROMPT, GREEDY))
    abandoned = InBackground(text_engine, lambda: text_engine.generate("A", GREEDY, rid="x"))
    text_engine.abort("x")
    assert abandoned.join().result["output_ids"] == [], "an abort needs no step"
    text_engine.continue_generation()
    text_engine.continue_generation()
    assert len(later.join().result["output_ids"]) == 12


def test_a_paused_loop_waits_without_working(text_engine):
    stream = text_engine.generate(PROMPT, LONG, stream=True)
    text_engine.pause_generation("in_place")
    settle(text_engine)
    started = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - started < 0.1
    text_engine.continue_generation()
    stream.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_paused_engine_shuts_down(make_engine, overlap):
    engine = make_engine(disable_overlap_schedule=not overlap)
    engine.pause_generation()
    call = InBackground(engine, lambda: engine.generate(input_ids=[1], sampling_params=GREEDY))
    engine.shutdown()
    assert call.join().result["meta_info"]["finish_reason"]["type"] == "abort"
    with pytest.raises(RuntimeError, match="was shut down"):
        engine.continue_generation()


def test_the_watchdog_takes_no_pause_for_a_hang(make_engine, caplog):
    engine = make_engine(watchdog_timeout=0.8)
    with caplog.at_level(logging.ERROR, logger="jaxengine"):
        engine.pause_generation()
        call = InBackground(engine, lambda: engine.generate(input_ids=[1], sampling_params=GREEDY))
        time.sleep(1.5)
        engine.continue_generation()
        call.join()
    assert not caplog.records


def test_other_modes_of_a_pause_are_refused(text_engine):
    with pytest.raises(ValueError, match="mode: expected abort or in_place or retract, got 'now'"):
        text_engine.pause_generation("now")
    assert text_engine.generate(PROMPT, GREEDY)["text"]


# Remote calls


def test_methods_of_the_scheduler_are_called_on_its_thread(text_engine, monkeypatch):
    text_engine.generate(PROMPT * 8, GREEDY)
    scheduler = text_engine._loop.scheduler
    assert scheduler.kv.tree.num_evictable > 0
    threads = []
    check = scheduler.check_integrity
    monkeypatch.setattr(
        scheduler, "check_integrity", lambda: threads.append(threading.current_thread()) or check()
    )
    text_engine.collective_rpc("check_integrity")
    assert threads == [text_engine._loop._thread]
    assert text_engine.collective_rpc("flush_cache") is True
    assert scheduler.kv.tree.num_evictable == 0


def test_no_other_method_is_called_from_afar(text_engine):
    for method in ("schedule", "__class__", "save_sharded_model"):
        with pytest.raises(ValueError, match=f"check_integrity or flush_cache, got '{method}'"):
            text_engine.collective_rpc(method)
    with pytest.raises(TypeError, match="unexpected keyword argument 'now'"):
        text_engine.collective_rpc("flush_cache", now=True)
    assert text_engine.generate(PROMPT, GREEDY)["text"], "the loop lives on"


def test_frozen_objects_are_out_of_garbage_collection(text_engine):
    try:
        text_engine.freeze_gc()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("start_expert_distribution_record", {}, "no experts"),
        ("stop_expert_distribution_record", {}, "no experts"),
        ("dump_expert_distribution_record", {}, "no experts"),
        ("save_sharded_model", {"path": "x", "pattern": None, "max_size": 1}, "copy the folder"),
        ("save_remote_model", {"url": "x"}, "copy the folder"),
        ("attach_tokenizer_worker", {}, "any number of threads"),
    ],
)
def test_what_there_is_no_need_of_says_what_to_do(text_engine, method, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        getattr(text_engine, method)(**arguments)


# Information


def test_the_server_info_names_what_runs(text_engine):
    info = text_engine.get_server_info()
    assert info["attention_backend"] == info["decode_attention_backend"] == "xla"
    assert info["prefill_attention_backend"] == "xla" and info["dtype"] == "float32"
    assert (info["tp_size"], info["pp_size"], info["dp_size"]) == (1, 1, 1)
    assert info["num_continuous_decode_steps"] == 1
    assert info.items() >= text_engine.scheduler_info.items()
    assert not info["internal_states"][0]["is_paused"]
    json.dumps(info)


def test_the_scheduler_info_is_sglang_s(text_engine):
    info = text_engine.scheduler_info
    assert info.keys() == {"status", "max_total_num_tokens", "max_req_input_len"}
    assert info["status"] == "ready"


def test_the_model_info(make_engine):
    engine = make_engine(served_model_name="small", weight_version="7")
    info = engine.get_model_info()
    assert info["model_path"] == info["tokenizer_path"] == engine.server_args.model_path
    assert info["served_model_name"] == "small" and info["weight_version"] == "7"
    assert info["architectures"] == ["Qwen3ForCausalLM"] and info["is_generation"]
    assert not info["has_image_understanding"] and not info["has_audio_understanding"]
    json.dumps(info)


def test_no_process_is_started(text_engine):
    assert text_engine.get_all_child_pids() == []
    assert text_engine.get_server_info()["version"] == __version__


# What SGLang's programs reach for


def test_its_tokenizer_and_aborts_are_where_sglang_has_them(text_engine):
    manager = text_engine.tokenizer_manager
    assert manager.tokenizer.encode(PROMPT) == text_engine.tokenizer.encode(PROMPT)
    call = lambda: text_engine.generate(PROMPT, LONG, rid="mine")
    for arguments in ({"rid": "mine"}, {"abort_all": True}, {"rid": "mine", "abort_all": True}):
        background = InBackground(text_engine, call)
        manager.abort_request(rid="nobody's")
        manager.abort_request()
        assert num_unfinished(text_engine) == 1
        manager.abort_request(**arguments)
        assert background.join().result["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("in_place", [True, False])
def test_its_pauses_are_coroutines_there(text_engine, in_place):
    async def main() -> dict:
        task = asyncio.create_task(text_engine.async_generate(PROMPT, LONG))
        await asyncio.sleep(0.01)
        request = [SimpleNamespace(mode="in_place")] if in_place else []
        await text_engine.tokenizer_manager.pause_generation(*request)
        assert text_engine.get_server_info()["internal_states"][0]["is_paused"]
        await text_engine.tokenizer_manager.continue_generation(SimpleNamespace())
        return await task

    reason = text_engine.loop.run_until_complete(main())["meta_info"]["finish_reason"]
    assert reason["type"] == ("length" if in_place else "abort")


def test_its_event_loop_is_the_running_one_or_its_own(text_engine):
    async def main() -> bool:
        return text_engine.loop is asyncio.get_running_loop()

    assert asyncio.run(main())
    own = text_engine.loop
    assert own is text_engine.loop and not own.is_closed()
    assert own.run_until_complete(text_engine.async_generate(PROMPT, GREEDY))["text"]


def test_the_event_loop_ends_with_the_engine(make_engine):
    engine = make_engine()
    event_loop, engine_loop = engine.loop, engine._loop
    assert engine.tokenizer_manager.tokenizer is None
    del engine
    gc.collect()
    assert event_loop.is_closed() and not engine_loop.is_alive
