"""Functions of a user's own within the steps: of logits, of the draw, of activations, and in NumPy
between two parts of a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import TINY, check_books
from test_programs import BUCKETS, step_programs
from tiny import tiny_config

from jaxengine import CustomLogitProcessor, Engine, Intervention, LogitsProcessor, Sampler
from jaxengine.function_checks import registered
from jaxengine.functions import NO_FUNCTIONS, Functions
from jaxengine.models.config import ModelConfig
from jaxengine.models.taps import Taps
from jaxengine.sampling_params import SamplingParams

V, D = 320, 64
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5, 4, 3, 12, 13, 14, 15, 16, 17], [40]]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def only(logits: jax.Array, params: Any, row: Any) -> jax.Array:
    """One token alone."""
    return jnp.where(jnp.arange(len(logits)) == params["token"], logits, -jnp.inf)


def count_up(logits: jax.Array, params: Any, row: Any, state: Any) -> tuple[jax.Array, Any]:
    """The token that the state counts."""
    return only(logits, {"token": state}, row), state


def next_count(state: jax.Array, params: Any, row: Any, token: jax.Array, logits: Any) -> Any:
    return token + params["step"]


def after_last(logits: jax.Array, params: Any, row: Any) -> jax.Array:
    """The token behind the last one, as far as there is one."""
    return only(logits, {"token": (row.tokens[row.length - 1] + 1) % len(logits)}, row)


def as_partner(logits: jax.Array, params: Any, row: Any) -> jax.Array:
    """Of all rows, those of the first."""
    return jnp.broadcast_to(logits[:1], logits.shape)


def second(logits: jax.Array, params: Any, row: Any) -> jax.Array:
    return jnp.argsort(logits)[-2].astype(jnp.int32)


def add(value: jax.Array, params: Any, token: Any) -> jax.Array:
    return value + params["vector"]


REGISTERED: dict[str, Any] = dict(
    logits_processors={
        "only": LogitsProcessor(function=only, params={"token": 3}),
        "count": LogitsProcessor(
            function=count_up,
            params={"first": 20, "step": 1},
            init=lambda params: params["first"],
            after=next_count,
        ),
        "after_last": after_last,
        "as_partner": LogitsProcessor(function=as_partner, batched=True),
    },
    sampler=second,
    interventions={
        "steer": Intervention(function=add, params={"vector": np.zeros(D)}, at="final_norm"),
        "steer_mlp": Intervention(
            function=add, params={"vector": np.zeros(D)}, at="mlp_output", layers=[1]
        ),
    },
)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(model_path=str(tiny_checkpoint), **TINY, **REGISTERED) as engine:
        check_books(engine)
        yield engine
        assert engine._loop.error is None


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(model_path=str(tiny_checkpoint), **TINY) as engine:
        yield engine


def outputs(engine: Engine, sampling: Any, prompts: Any = PROMPTS, **more: Any) -> list[list[int]]:
    results = engine.generate(input_ids=prompts, sampling_params=sampling, **more)
    return [result["output_ids"] for result in results]


def test_a_request_chooses_functions_and_their_numbers(engine: Engine) -> None:
    chosen = GREEDY | {"logits_processors": "only"}
    before = engine.get_server_info()["num_compilations_since_start"]
    assert outputs(engine, chosen) == [[3] * 12] * 3
    assert outputs(engine, chosen | {"custom_params": {"token": 7}}) == [[7] * 12] * 3
    assert engine.get_server_info()["num_compilations_since_start"] == before


def test_a_function_sees_the_tokens_so_far(engine: Engine) -> None:
    chosen = GREEDY | {"logits_processors": ["after_last"]}
    assert outputs(engine, chosen) == [list(range(p[-1] + 1, p[-1] + 13)) for p in PROMPTS]


def test_others_in_the_batch_are_left_alone_to_the_last_bit(engine: Engine, plain: Engine) -> None:
    expected = outputs(plain, GREEDY)
    mixed = [GREEDY, GREEDY | {"logits_processors": "count"}, GREEDY]
    results = engine.generate(input_ids=PROMPTS, sampling_params=mixed, return_logprob=True)
    assert [result["output_ids"] for result in results][::2] == expected[::2]
    alone = plain.generate(input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True)
    for index in (0, 2):
        told = "output_token_logprobs"
        assert results[index]["meta_info"][told] == alone[index]["meta_info"][told]


def test_a_state_is_kept_for_each_request(engine: Engine) -> None:
    params = [
        GREEDY | {"logits_processors": "count", "custom_params": {"first": 50 * i, "step": 1 + i}}
        for i in (1, 2, 3)
    ]
    expected = [list(range(50 * i, 50 * i + 12 * (1 + i), 1 + i)) for i in (1, 2, 3)]
    assert outputs(engine, params) == expected


def test_a_state_outlives_retraction(tiny_checkpoint: Path) -> None:
    """Pages for one of the two requests, which therefore take turns."""
    sizes = TINY | dict(max_total_tokens=64, schedule_conservativeness=0.0)
    with Engine(model_path=str(tiny_checkpoint), **sizes, **REGISTERED) as engine:
        check_books(engine)
        chosen = {"logits_processors": "count", "max_new_tokens": 48, "custom_params": {"first": 1}}
        results = engine.generate(input_ids=[[5, 6, 7], [9, 8, 7]], sampling_params=GREEDY | chosen)
    assert sum(result["meta_info"]["total_retractions"] for result in results) > 0
    assert [result["output_ids"] for result in results] == [list(range(1, 49))] * 2


def test_several_functions_follow_one_another(engine: Engine) -> None:
    chosen = GREEDY | {"logits_processors": ["count", "only"], "custom_params": {"token": 20}}
    [result] = engine.generate(
        input_ids=PROMPTS[:1],
        sampling_params=chosen | {"max_new_tokens": 1},
        return_logprob=True,
        top_logprobs_num=2,
    )
    assert result["output_ids"] == [20]
    top = result["meta_info"]["output_top_logprobs"][0]
    assert top[0][:2] == (0.0, 20), "the distribution told of is the one drawn from"


def test_a_batched_function_sees_all_rows(engine: Engine, plain: Engine) -> None:
    expected = outputs(plain, GREEDY, PROMPTS[:1])[0][0]
    chosen = GREEDY | {"logits_processors": "as_partner", "max_new_tokens": 1}
    together = outputs(engine, [GREEDY | {"max_new_tokens": 1}, chosen], PROMPTS[:2])
    assert together == [[expected], [expected]]


def test_a_sampler_draws_for_all_but_greedy_requests(engine: Engine, plain: Engine) -> None:
    asked: dict[str, Any] = dict(input_ids=PROMPTS[0], return_logprob=True, top_logprobs_num=2)
    for temperature, place in ((0, 0), (0.7, 1)):
        told = engine.generate(sampling_params=GREEDY | {"temperature": temperature}, **asked)
        for (_, token, _), top in zip(
            told["meta_info"]["output_token_logprobs"],
            told["meta_info"]["output_top_logprobs"],
            strict=True,
        ):
            assert token == top[place][1]


@pytest.mark.parametrize("name", ["steer", "steer_mlp"])
def test_an_intervention_changes_activations(engine: Engine, plain: Engine, name: str) -> None:
    """None with a vector of zeros; with another one its own tokens alone, whatever is cached."""
    expected = outputs(plain, GREEDY)
    chosen = GREEDY | {"interventions": name}
    assert outputs(engine, GREEDY) == expected
    assert outputs(engine, chosen) == expected
    vector = np.random.default_rng(0).standard_normal(D)
    steered = chosen | {"custom_params": {"vector": vector.tolist()}}
    mixed = outputs(engine, [steered, GREEDY, steered])
    assert mixed[0] != expected[0] and mixed[1] == expected[1] and mixed[2] != expected[2]
    assert outputs(engine, steered)[0] == mixed[0]
    assert outputs(engine, GREEDY) == expected, "nothing steered was cached"


class Force(CustomLogitProcessor):
    """The token that `custom_params` name, then those behind it."""

    def __call__(self, logits: np.ndarray, custom_param_list: list[Any]) -> np.ndarray:
        assert logits.flags.writeable and logits.dtype == np.float32
        for row, params in zip(logits, custom_param_list, strict=True):
            token = params["token"] + len(params["__req__"].output_ids)
            row[:] = np.where(np.arange(len(row)) == token, row, -np.inf)
        return logits


class Fails(CustomLogitProcessor):
    def __call__(self, logits: np.ndarray, custom_param_list: list[Any]) -> np.ndarray:
        raise RuntimeError("no")


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_numpy_processor_changes_the_logits_of_its_requests(
    tiny_checkpoint: Path, plain: Engine, overlaps: bool
) -> None:
    expected = outputs(plain, GREEDY)
    arguments: dict[str, Any] = TINY | dict(disable_overlap_schedule=not overlaps)
    with Engine(model_path=str(tiny_checkpoint), **arguments) as engine:
        check_books(engine)
        forced = GREEDY | {"custom_params": {"token": 100}}
        params = [GREEDY, forced, GREEDY]
        got = outputs(engine, params, custom_logit_processor=[None, Force(), None])
        assert got == [expected[0], list(range(100, 112)), expected[2]]
        results = engine.generate(
            input_ids=PROMPTS, sampling_params=GREEDY, custom_logit_processor=[None, Fails(), None]
        )
        assert [result["output_ids"] for result in results] == [expected[0], [], expected[2]]
        reason = results[1]["meta_info"]["finish_reason"]
        assert reason["type"] == "abort" and reason["status_code"] == 400
        assert reason["message"] == "custom_logit_processor: RuntimeError: no"


def test_mistakes_in_a_call_are_named(engine: Engine) -> None:
    def refused(match: str, **sampling: Any) -> None:
        with pytest.raises(ValueError, match=match):
            engine.generate(input_ids=[5], sampling_params=GREEDY | sampling)

    refused(
        "logits_processors: none is registered as 'onyl'; expected.*only", logits_processors="onyl"
    )
    refused("interventions: none is registered as 'only'", interventions=["only"])
    refused("none of the chosen functions has a parameter 'token'", custom_params={"token": 3})
    wrong = {"logits_processors": "only", "custom_params": {"token": [1, 2]}}
    refused("token: expected int32 of shape", **wrong)
    refused("token: expected int32", **wrong | {"custom_params": {"token": 1.5}})
    with pytest.raises(ValueError, match="no code is taken from strings"):
        engine.generate(input_ids=[5], custom_logit_processor="{}")


def test_mistakes_are_told_before_anything_is_compiled(tiny_checkpoint: Path) -> None:
    def refused(match: str, **registered: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Engine(model_path=str(tiny_checkpoint), **TINY, **registered)

    refused("logits_processors: expected a dict of name", logits_processors=[after_last])
    with pytest.raises(TypeError, match="did you mean 'logits_processors'"):
        Engine(logit_processors={"x": after_last})  # type: ignore[arg-type]
    half = lambda logits, params, row: logits[: len(logits) // 2]
    refused(
        r"logits_processors\['half'\]: it returned float32\[2, 160\]",
        logits_processors={"half": half},
    )
    typo = lambda logits, params, row: logits * params["sclae"]
    refused(r"logits_processors\['typo'\]: .*sclae", logits_processors={"typo": typo})
    refused("sampler: it returned float32", sampler=lambda logits, params, row: logits[0])
    refused("the name 'sampler' is taken", logits_processors={"sampler": half})
    refused(
        "expected a Intervention|expected an", interventions={"x": LogitsProcessor(function=half)}
    )
    nowhere = Intervention(function=add, params={"vector": np.zeros(D)}, at="nowhere")
    refused("at: expected one of embedding", interventions={"x": nowhere})
    far = Intervention(function=add, params={"vector": np.zeros(D)}, layers=[7])
    refused("layers: expected some of 0 to 1", interventions={"x": far})
    with pytest.raises(ValueError, match="there is no init"):
        LogitsProcessor(function=only, after=next_count)


def test_without_functions_a_step_is_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no place for them in it."""
    config = ModelConfig.from_dict(tiny_config("qwen3").to_dict())

    def lowered(functions: Functions) -> list[str]:
        steps = step_programs(config, "float32", functions=functions)
        return [steps.lower_step(bucket, 9).as_text() for bucket in BUCKETS.values()]

    with_none = lowered(NO_FUNCTIONS)
    assert lowered(registered({"next": after_last}, None, None)) != with_none
    straight = lambda self, logits, see, choices, memory, draw: (logits, draw(logits), memory)
    monkeypatch.setattr(Functions, "choose", straight)
    monkeypatch.setattr(Functions, "edits", lambda *_: [])
    monkeypatch.setattr(Taps, "__call__", lambda self, point, layer, value: value)
    assert lowered(NO_FUNCTIONS) == with_none


def test_numbers_travel_by_their_bits() -> None:
    processor = LogitsProcessor(
        function=only,
        params={"token": 3, "scale": 0.5, "on": True, "table": np.arange(6.0).reshape(2, 3)},
    )
    functions = registered({"only": processor}, Sampler(function=second), None)
    given: dict[str, Any] = {"scale": -2.5, "on": False, "table": [[9, 8, 7], [6, 5, 4]]}
    packed = functions.pack(["only"], given)
    functions.check(SamplingParams(logits_processors="only", custom_params=given))
    memory, choices = functions.install(
        *functions.empty(4), jnp.array([2]), jnp.asarray(packed)[None]
    )
    np.testing.assert_array_equal(choices.is_chosen["only"], [False, False, True, False])
    params: Any = choices.params["only"]
    np.testing.assert_array_equal(params["scale"], np.array([0.5, 0.5, -2.5, 0.5], np.float32))
    np.testing.assert_array_equal(params["on"], [True, True, False, True])
    assert params["table"][2].tolist() == given["table"]
    np.testing.assert_array_equal(params["token"], [3, 3, 3, 3])
    assert memory == {}


def test_those_that_remember_are_known() -> None:
    counts = LogitsProcessor(function=count_up, init=lambda params: 0)
    functions = registered({"only": only, "counts": counts}, None, None)
    assert functions.remembers(["only", "counts"]) and not functions.remembers(["only"])
    remembering = Sampler(function=count_up, init=lambda params: 0)
    assert registered({"only": only}, remembering, None).remembers([])
    assert not registered(None, Sampler(function=second), None).remembers([])
