"""Any number of event loops and threads, one after the other and at once, mixed with plain calls.
Nothing here is helped by nest_asyncio."""

import asyncio
import gc
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engines import num_unfinished

from jaxengine import Engine

PROMPT = "The import statement"
PROMPTS = [PROMPT, "A dictionary is", "The file object"]
GREEDY = {"temperature": 0, "max_new_tokens": 10}
LONG = {"temperature": 0, "max_new_tokens": 500, "ignore_eos": True}


@pytest.fixture
def expected(text_engine):
    return [result["text"] for result in text_engine.generate(PROMPTS, GREEDY)]


async def texts_of(engine: Any) -> list[str]:
    return [result["text"] for result in await engine.async_generate(PROMPTS, GREEDY)]


async def streamed(engine: Any, prompt: str) -> str:
    text = ""
    async for chunk in await engine.async_generate(prompt, GREEDY, stream=True):
        text = chunk["text"]
    return text


def test_event_loops_may_follow_one_another(text_engine, expected):
    for _ in range(3):
        assert asyncio.run(texts_of(text_engine)) == expected
        assert text_engine.generate(PROMPT, GREEDY)["text"] == expected[0]


def test_event_loops_may_run_at_once(text_engine, expected):
    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(asyncio.run, texts_of(text_engine)) for _ in range(6)]
        assert [job.result() for job in jobs] == [expected] * 6


def test_many_threads_may_call_at_once(text_engine, expected):
    call = lambda i: text_engine.generate(PROMPTS[i % 3], GREEDY, stream=i % 2 == 0)
    with ThreadPoolExecutor(16) as threads:
        for i, given in enumerate(threads.map(call, range(32))):
            result = given if i % 2 else list(given)[-1]
            assert result["text"] == expected[i % 3]


def test_many_tasks_of_one_loop_run_side_by_side(text_engine, expected):
    async def main() -> list[str]:
        return await asyncio.gather(*(streamed(text_engine, PROMPTS[i % 3]) for i in range(12)))

    assert asyncio.run(main()) == expected * 4


def test_a_plain_call_works_inside_a_running_loop(text_engine, expected):
    async def main() -> tuple:
        task = asyncio.ensure_future(texts_of(text_engine))
        await asyncio.sleep(0)
        inside = text_engine.generate(PROMPT, GREEDY)["text"]
        [*_, chunk] = text_engine.generate(PROMPT, GREEDY, stream=True)
        return inside, chunk["text"], await task

    assert asyncio.run(main()) == (expected[0], expected[0], expected)


def test_the_loop_is_not_blocked_while_a_call_starts(text_engine):
    loop = text_engine._loop
    is_held, may_go = threading.Event(), threading.Event()

    async def main() -> str:
        loop.call(lambda: (is_held.set(), may_go.wait()))  # the engine is busy with a long step
        is_held.wait()
        task = asyncio.ensure_future(text_engine.async_generate(PROMPT, GREEDY))
        stream = asyncio.ensure_future(streamed(text_engine, PROMPT))
        await asyncio.sleep(0.01)  # would never return
        may_go.set()
        assert (await task)["text"] == await stream
        return "done"

    assert asyncio.run(main()) == "done"


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_task_aborts_its_requests(text_engine, stream):
    async def endless() -> None:
        result = await text_engine.async_generate(PROMPTS, LONG, stream=stream)
        if stream:
            async for _ in result:
                pass

    async def main() -> None:
        task = asyncio.ensure_future(endless())
        while num_unfinished(text_engine) < len(PROMPTS):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert num_unfinished(text_engine) == 0

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_cancelled_before_it_was_heard_never_starts(text_engine, stream):
    loop = text_engine._loop
    may_go = threading.Event()

    async def main() -> None:
        loop.call(may_go.wait)
        task = asyncio.ensure_future(text_engine.async_generate(PROMPT, LONG, stream=stream))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_go.set()

    before = loop.num_steps
    asyncio.run(main())
    assert num_unfinished(text_engine) == 0 and loop.num_steps == before


def test_a_timeout_aborts(text_engine):
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(text_engine.async_generate(PROMPT, LONG), 0.1)

    asyncio.run(main())
    assert num_unfinished(text_engine) == 0


def test_an_event_loop_that_ends_under_its_streams_leaves_nothing_running(text_engine):
    kept: list = []

    async def main() -> None:
        stream = await text_engine.async_generate(PROMPTS, LONG, stream=True)
        await anext(stream)
        kept.append(stream)

    asyncio.run(main())
    assert num_unfinished(text_engine) == len(PROMPTS)
    kept.clear()
    gc.collect()
    assert num_unfinished(text_engine) == 0


def test_a_closed_stream_is_over(text_engine):
    async def main() -> list:
        stream = await text_engine.async_generate(PROMPT, LONG, stream=True)
        await anext(stream)
        await stream.aclose()
        return [chunk async for chunk in stream]

    assert asyncio.run(main()) == []


def test_errors_are_those_of_a_plain_call(text_engine):
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        asyncio.run(text_engine.async_generate("", stream=True))
    with pytest.raises(TypeError, match="unexpected argument 'temperature'"):
        asyncio.run(text_engine.async_generate("a", temperature=0))

    async def twice() -> None:
        stream = await text_engine.async_generate(PROMPT, LONG, stream=True, rid="mine")
        with pytest.raises(ValueError, match="rid 'mine' is in use"):
            await text_engine.async_generate(PROMPT, LONG, rid="mine")
        assert num_unfinished(text_engine) == 1
        await stream.aclose()

    asyncio.run(twice())


@pytest.mark.parametrize("name", ["generate", "score", "encode"])
def test_twins_have_one_signature(name):
    plain, twin = getattr(Engine, name), getattr(Engine, f"async_{name}")
    assert inspect.signature(plain) == inspect.signature(twin)
    assert inspect.iscoroutinefunction(twin) and twin.__name__ == f"async_{name}"


def test_a_wrong_argument_of_a_twin_is_named(text_engine):
    with pytest.raises(TypeError, match=r"unexpected argument 'max_tokens'.*max_new_tokens"):
        asyncio.run(text_engine.async_generate("a", max_tokens=3))
    with pytest.raises(TypeError, match="lables"):
        asyncio.run(text_engine.async_score("a", ["b"], lables=[3]))
