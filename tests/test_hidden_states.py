"""Hidden states: transformers', however a request was scheduled; and what a request may ask."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TINY, check_books
from oracle import causal_outputs
from safetensors.numpy import load_file
from test_logprobs import prompts_of
from tiny import save_checkpoint, tiny_config

from jaxengine import Engine
from jaxengine.hidden_states import Gathered, HiddenStates, Launch, StateBooks
from jaxengine.state_files import save_hidden_states

L, D = 2, 64
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
STEPS: dict[str, Any] = TINY | dict(num_continuous_decode_steps=4)
Exact = Callable[[list[int]], list[np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    save_checkpoint(folder, tiny_config("qwen3"), seed=2)
    return folder


@pytest.fixture(scope="module")
def one_engine(folder: Path) -> Iterator[Engine]:
    with Engine(model_path=str(folder), **STEPS) as engine:
        check_books(engine)
        yield engine


@pytest.fixture
def engine(one_engine: Engine) -> Engine:
    assert one_engine.flush_cache().success
    return one_engine


@pytest.fixture(scope="module")
def exact(folder: Path) -> Exact:
    """Ids -> hidden states [tokens D], of the embedding, behind the first layer and so on."""
    outputs_of = causal_outputs(folder)

    def states_of(ids: list[int]) -> list[np.ndarray]:
        found = outputs_of(ids, output_hidden_states=True).hidden_states
        return [each[0].numpy() for each in found]

    return states_of


def near(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def ask(engine: Engine, prompts: Any, states: Any, sampling: Any = GREEDY) -> list[Any]:
    results = engine.generate(
        input_ids=prompts, sampling_params=sampling, return_hidden_states=states
    )
    return [(r["output_ids"], r["meta_info"].get("hidden_states")) for r in results]


@pytest.mark.oracle
def test_the_final_states_of_prompt_and_output(engine: Engine, exact: Exact) -> None:
    """Prompts of several chunks among them, mixed with rows that ask for nothing."""
    prompts = prompts_of([3, 50, 17, 1, 90])
    results = ask(engine, prompts, [True, None, True, True, True])
    for index, (prompt, (outputs, states)) in enumerate(zip(prompts, results, strict=True)):
        if index == 1:
            assert states is None
            continue
        expected = exact(prompt + outputs[:-1])[-1]
        assert len(states) == len(outputs) == 10
        near(states[0], expected[: len(prompt)])
        near(np.stack(states[1:]), expected[len(prompt) :])
        near(states[-1], expected[-1])
        near(states.array(), expected)
        with pytest.raises(IndexError):
            states[10]


@pytest.mark.oracle
def test_of_any_layer_and_position(engine: Engine, exact: Exact) -> None:
    [prompt] = prompts_of([40])
    asked = {"layers": [0, 1, -1], "positions": [5, 41, -1, 500]}
    [(outputs, states)] = ask(engine, [prompt], asked)
    expected = exact(prompt + outputs[:-1])
    assert list(states.positions) == [5, 39, 41]
    assert states.places == (("block_input", 0), ("block_input", 1), ("final_norm", None))
    for place, whole in zip(states.places, expected, strict=True):
        near(states.array(place), whole[[5, 39, 41]])
    near(states[0], expected[0][[5, 39]])
    near(states[2], expected[0][41])
    with pytest.raises(IndexError, match="position 40 was not asked for"):
        states[1]


def test_points_within_a_layer_add_up(engine: Engine) -> None:
    [prompt] = prompts_of([40])
    layers = ["block_input.0", "attention_output.0", "mlp_output.0", "block_input.1", "embedding"]
    [(_, states)] = ask(engine, [prompt], {"layers": layers})
    before, attention, mlp, after, embedding = (states.array(place) for place in states.places)
    near(before + attention + mlp, after)
    near(before, embedding)
    assert np.abs(attention).max() > 0.01 and np.abs(mlp).max() > 0.01


@pytest.mark.oracle
def test_a_cached_prefix_changes_nothing(engine: Engine, exact: Exact) -> None:
    [prompt] = prompts_of([60])
    first = ask(engine, [prompt], None)[0][0]
    for asked in (True, {"positions": [-3]}, "last"):
        outputs, states = ask(engine, [prompt], asked)[0]
        assert outputs == first
        expected = exact(prompt + outputs[:-1])[-1]
        if asked == "last":
            near(states, expected[-1])
        else:
            near(states.array(), expected if asked is True else expected[[57]])
    results = engine.generate(
        input_ids=[prompt], sampling_params=GREEDY, return_hidden_states={"positions": [-3]}
    )
    assert results[0]["meta_info"]["cached_tokens"] == 57, "what nobody asks for is not read again"


@pytest.mark.oracle
def test_retraction_changes_nothing(folder: Path, exact: Exact) -> None:
    prompts = prompts_of([20, 21])
    sizes: dict[str, Any] = TINY | dict(max_total_tokens=96, schedule_conservativeness=0.0)
    with Engine(model_path=str(folder), **sizes) as engine:
        check_books(engine)
        sampling = GREEDY | {"max_new_tokens": 60}
        results = engine.generate(
            input_ids=prompts, sampling_params=sampling, return_hidden_states=True
        )
    assert sum(result["meta_info"]["total_retractions"] for result in results) > 0
    for prompt, result in zip(prompts, results, strict=True):
        states = result["meta_info"]["hidden_states"]
        near(states.array(), exact(prompt + result["output_ids"][:-1])[-1])


def test_nothing_to_generate_and_streams(engine: Engine) -> None:
    [prompt] = prompts_of([7])
    nothing = {"max_new_tokens": 0}
    [(outputs, states)] = ask(engine, [prompt], True, nothing)
    assert outputs == [] and len(states) == 1 and states[0].shape == (7, D)
    [(_, last)] = ask(engine, [prompt], "last", nothing)
    near(last, states[0][-1])
    chunks = list(
        engine.generate(
            input_ids=prompt, sampling_params=GREEDY, return_hidden_states=True, stream=True
        )
    )
    assert ["hidden_states" in chunk["meta_info"] for chunk in chunks[-2:]] == [False, True]
    near(chunks[-1]["meta_info"]["hidden_states"][0], states[0])


def test_together_with_log_probabilities(engine: Engine) -> None:
    [prompt] = prompts_of([30])
    asked: dict[str, Any] = dict(input_ids=prompt, sampling_params=GREEDY)
    logprobs: dict[str, Any] = dict(return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    both = engine.generate(**asked, **logprobs, return_hidden_states=True)["meta_info"]
    states = engine.generate(**asked, return_hidden_states=True)["meta_info"]["hidden_states"]
    told = engine.generate(**asked, **logprobs)["meta_info"]
    near(both["hidden_states"].array(), states.array())
    for name in ("input_token_logprobs", "output_token_logprobs"):
        numbers = [[entry[0] for entry in info[name][1:]] for info in (both, told)]
        near(*numbers)


@pytest.mark.parametrize("stream", [True, False])
def test_files_of_many_prompts(engine: Engine, tmp_path: Path, stream: bool) -> None:
    prompts = prompts_of([5, 9, 30, 2])
    asked: dict[str, Any] = dict(
        input_ids=prompts,
        sampling_params=GREEDY | {"max_new_tokens": 2},
        return_hidden_states=[{"layers": ["mlp_output.1", -1]}] * 3 + ["last"],
    )
    expected = [result["meta_info"]["hidden_states"] for result in engine.generate(**asked)]
    results = engine.generate(**asked, stream=stream)
    files = save_hidden_states(tmp_path / "states", results, shard_bytes=8000)
    assert len(files) > 1
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert len(found) == 3 * 3 + 1
    for index, states in enumerate(expected[:3]):
        np.testing.assert_array_equal(
            found[f"{index}.positions"], np.arange(len(prompts[index]) + 1)
        )
        near(found[f"{index}.mlp_output.1"], states.array(("mlp_output", 1)))
        near(found[f"{index}.final_norm"], states.array(("final_norm", None)))
    near(found["3.last"], expected[3])
    with pytest.raises(ValueError, match="holds hidden states already"):
        save_hidden_states(tmp_path / "states", [])
    with pytest.raises(ValueError, match="result 0 has no hidden states"):
        plain = engine.generate(input_ids=prompts[:1], sampling_params=GREEDY)
        save_hidden_states(tmp_path / "none", plain)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("first", "expected True, 'last', or a dict"),
        ({"layer": [1]}, "expected True, 'last', or a dict"),
        ({"layers": [3]}, "expected numbers from -3 to 2"),
        ({"layers": []}, "layers: expected a list of some"),
        ({"layers": ["mlp_output"]}, "mlp_output.0"),
        ({"positions": "some"}, "positions: expected 'all', 'last' or a list"),
        ({"positions": [-4]}, "expected -3 or more for a prompt of 3, got -4"),
        ([True, True], "expected 1 values"),
    ],
)
def test_mistakes_are_named(engine: Engine, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(engine, [[5, 6, 7]], asked)


def test_too_much_on_the_device_moves_to_the_host() -> None:
    def launch(value: float) -> Launch:
        last = np.full((1, 1, 1, 8), value, np.float32)
        return Launch((("final_norm", None),), Counted(last), None)

    class Counted:
        """An array that is asked for its values."""

        def __init__(self, values: np.ndarray):
            self.values, self.nbytes = values, values.nbytes

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            moved.append(float(self.values.flat[0]))
            return self.values

    moved: list[float] = []
    gathered = Gathered(max_bytes=80)
    launches = [launch(value) for value in (1, 2, 3, 4)]
    books = StateBooks(places=launches[0].places)
    for position, each in enumerate(launches):
        gathered.add(each)
        books.add(each, 0, 0, position, position + 1, 1)
    assert moved == [1, 2]
    states = HiddenStates(books, prompt_len=2, num_outputs=3)
    np.testing.assert_array_equal(states.array()[:, 0], [1, 2, 3, 4])
    assert moved == [1, 2, 3, 4]
