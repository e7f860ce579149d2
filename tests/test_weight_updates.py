"""Other weights for a running engine: it then gives what an engine made with them gives, and
nothing computed with the old ones is used again."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engines import TINY, InBackground, check_books, settle
from flax import nnx
from naive import naive_greedy
from safetensors.numpy import save_file
from tiny import save_checkpoint, tiny_config

from jaxengine import Engine, models, weights
from jaxengine.hub import read_json
from jaxengine.models.config import ModelConfig
from jaxengine.weight_updates import named_parts

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [200], [31, 7, 7]]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
LONG = GREEDY | {"max_new_tokens": 200}
UP = "model.layers.1.mlp.up_proj.weight"

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("old")
    return folder, save_checkpoint(folder, tiny_config("qwen3"), seed=1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("new")
    return folder, save_checkpoint(folder, tiny_config("qwen3"), seed=2, shards=2)


@pytest.fixture(scope="module")
def shared(old: tuple[Path, Tensors]) -> Iterator[Engine]:
    with Engine(model_path=str(old[0]), **TINY) as engine:
        check_books(engine)
        yield engine
        assert engine._loop.error is None
        assert engine.get_server_info()["num_compilations_since_start"] == 0


@pytest.fixture
def engine(shared: Engine, old: tuple[Path, Tensors]) -> Iterator[Engine]:
    """With the old weights, before and after."""
    yield shared
    assert shared.update_weights(old[1], weight_version="default").success
    assert shared._loop.num_live == 0


@pytest.fixture(scope="module")
def old_ids(shared: Engine) -> list[list[int]]:
    return ids_of(shared)


@pytest.fixture(scope="module")
def new_ids(new: tuple[Path, Tensors], old_ids: list[list[int]]) -> list[list[int]]:
    """What an engine made with the new weights gives."""
    with Engine(model_path=str(new[0]), **TINY) as engine:
        made = ids_of(engine)
    assert all(ours != theirs for ours, theirs in zip(made, old_ids, strict=True))
    return made


@pytest.fixture(scope="module")
def naive_new(new: tuple[Path, Tensors]) -> Callable[..., list[int]]:
    return naive_greedy(new[0], TINY["context_length"])


def ids_of(engine: Engine, prompts: Any = PROMPTS) -> list[list[int]]:
    return [r["output_ids"] for r in engine.generate(input_ids=prompts, sampling_params=GREEDY)]


def state_of(folder: Path, dtype: str = "float32") -> nnx.State:
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    abstract = nnx.eval_shape(lambda: models.build(config, dtype=dtype))
    return weights.load_parameters(
        folder, abstract, models.checkpoint_pieces(config), progress=False
    )


def model_of(folder: Path) -> nnx.Module:
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    return nnx.merge(nnx.graphdef(models.build(config)), state_of(folder))


FORMS: dict[str, Callable[[Path, Tensors], Any]] = {
    "model": lambda folder, tensors: model_of(folder),
    "state": lambda folder, tensors: state_of(folder),
    "dictionary": lambda folder, tensors: nnx.to_pure_dict(state_of(folder)),
    "by path": lambda folder, tensors: {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(state_of(folder))
    },
    "checkpoint": lambda folder, tensors: tensors,
    "on the device": lambda folder, tensors: jax.tree.map(jnp.asarray, tensors),
    "with what needs no place": lambda folder, tensors: (
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_updated_engine_gives_what_one_made_with_the_weights_gives(engine, new, new_ids, form):
    given = FORMS[form](*new)
    result = engine.update_weights(given)
    assert result.success and "0 running requests" in result.message
    assert ids_of(engine) == new_ids


def test_tensors_come_as_pairs_of_any_framework(engine, new, new_ids):
    torch = pytest.importorskip("torch")
    kinds = [
        torch.from_numpy,
        lambda array: torch.nn.Parameter(torch.from_numpy(array.copy())),
        lambda array: torch.from_numpy(np.stack([array, -array], -1))[..., 0],
        jnp.asarray,
        lambda array: array.astype(np.float64),
    ]
    pairs = ((name, kinds[i % 5](array)) for i, (name, array) in enumerate(new[1].items()))
    assert engine.update_weights_from_tensor(pairs) == (
        True,
        f"{len(new[1])} arrays were updated, 0 running requests are read anew",
    )
    assert ids_of(engine) == new_ids
    half = torch.full((96, 64), 0.3, dtype=torch.bfloat16)
    assert engine.update_weights_from_tensor([(UP, half)], load_format="direct").success
    assert engine.get_weights_by_name(UP, 1) == [[0.30078125] * 64]


def test_the_weights_of_another_folder(engine, new, new_ids):
    assert engine.update_weights_from_disk(str(new[0])) == (
        True,
        f"{len(new[1])} arrays were updated, 0 running requests are read anew",
        0,
    )
    assert ids_of(engine) == new_ids
    assert engine.update_weights_from_disk(str(new[0]), load_format="safetensors").success


def test_a_part_may_be_updated(engine, old, new, tmp_path):
    mixed = old[1] | {name: new[1][name] for name in (UP, "model.norm.weight")}
    save_checkpoint(tmp_path, tiny_config("qwen3"))
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    naive = naive_greedy(tmp_path, TINY["context_length"])
    engine.update_weights({UP: new[1][UP], "norm": jnp.asarray(new[1]["model.norm.weight"])})
    assert ids_of(engine) == [naive(prompt, 12) for prompt in PROMPTS]
    same = [name for name in mixed if name != UP and name != "model.norm.weight"]
    for name in [UP, *same]:
        assert engine.get_weights_by_name(name, 400) == mixed[name].tolist()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, ml_dtypes.bfloat16, np.float16])
def test_other_floats_are_cast(engine, new, dtype):
    as_array = jnp.asarray if issubclass(type(dtype), type(jnp.float16)) else np.asarray
    engine.update_weights({UP: as_array(new[1][UP], dtype)})
    assert engine.get_weights_by_name(UP) == new[1][UP].astype(dtype).astype(np.float32).tolist()


def test_a_weakly_typed_array_is_an_array_like_any_other(engine):
    assert (ones := jnp.full((96, 64), 1.0)).weak_type
    engine.update_weights({UP: ones})
    assert engine.get_weights_by_name(UP, 1) == [[1.0] * 64]


def test_a_state_on_two_steps_of_training_costs_one_compilation_of_each_shape(engine, new):
    copies = engine._started.occupation._copies
    engine.update_weights(state_of(new[0]))
    num_compiled = len(copies._compiled)
    engine.update_weights(state_of(new[0]))
    assert len(copies._compiled) == num_compiled


def deleted() -> jax.Array:
    array = jnp.zeros((96, 64))
    array.delete()
    return array


BAD: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "unknown": (lambda t: t | {"model.norm.wait": t[UP]}, r"^model\.norm\.wait: .*'model\.norm"),
    "shape": (lambda t: t | {UP: t[UP].T}, rf"^{UP}: expected the shape \(96, 64\), got \(64, 96"),
    "path's shape": (
        lambda t: {"layers": {0: {"mlp": {"down": t[UP]}}}},
        r"^layers\.0\.mlp\.down: expected the shape \(64, 96\)",
    ),
    "integers": (lambda t: t | {UP: t[UP].astype(np.int8)}, f"^{UP}: .*got int8; quantized"),
    "float8": (
        lambda t: t | {UP: jnp.asarray(t[UP], jnp.float8_e4m3fn)},
        f"^{UP}: .*got float8_e4m3fn",
    ),
    "no array": (lambda t: t | {UP: t[UP].tolist()}, f"^{UP}: expected an array, got list"),
    "deleted": (lambda t: t | {UP: deleted()}, f"^{UP}: the array was deleted or donated"),
    "twice": (
        lambda t: t | {"layers.1.mlp.gate_up": np.zeros((2, 96, 64), np.float32)},
        r"^given twice: model\.layers\.1\.mlp\.gate_proj\.weight, model.*up_proj",
    ),
    "nothing": (lambda t: {}, "at least one array"),
    "leaves": (lambda t: list(t.values()), "^weights: expected an nnx model.* got list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_changes_nothing(engine, new, old_ids, kind):
    make, message = BAD[kind]
    before = engine._loop.runner.params
    with pytest.raises(ValueError, match=message):
        engine.update_weights(make(new[1]))
    assert engine._loop.runner.params is before
    assert ids_of(engine) == old_ids


def test_a_bad_update_from_tensors_says_so(engine, new, old_ids):
    success, message = engine.update_weights_from_tensor([*new[1].items(), ("no.such", new[1][UP])])
    assert not success and message.startswith("no.such: this model has no")
    with pytest.raises(ValueError, match="^load_format: expected None or 'direct', got 'flatt"):
        engine.update_weights_from_tensor([], load_format="flattened_bucket")
    with pytest.raises(ValueError, match="^load_format: expected None or 'auto'"):
        engine.update_weights_from_disk(str(new[0]), load_format="pt")
    assert ids_of(engine) == old_ids


def spoil_file(folder: Path, tensors: Tensors) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_config(folder: Path, tensors: Tensors) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


def spoil_names(folder: Path, tensors: Tensors) -> None:
    save_file(tensors | {"extra": tensors[UP]}, folder / "model.safetensors")


def drop_a_tensor(folder: Path, tensors: Tensors) -> None:
    save_file({n: t for n, t in tensors.items() if n != UP}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_file, "is not a whole safetensors file"),
        (spoil_config, "is another model: its config.json differs in rms_norm_eps"),
        (spoil_names, "extra: this model has no parameter or tensor of that name"),
        (drop_a_tensor, f"lacks {UP}"),
    ],
)
def test_a_bad_folder_leaves_the_old_weights(engine, old_ids, tmp_path, spoil, message):
    spoil(tmp_path, save_checkpoint(tmp_path, tiny_config("qwen3"), seed=2))
    success, said, num_paused = engine.update_weights_from_disk(str(tmp_path))
    assert not success and message in said and num_paused == 0
    assert ids_of(engine) == old_ids
    assert not engine.update_weights_from_disk("/nowhere").success


def test_the_caller_may_do_with_its_arrays_what_it_likes(engine, new, new_ids):
    given = jax.tree.map(jnp.asarray, new[1])
    engine.update_weights(given)
    wipe = jax.jit(lambda arrays: jax.tree.map(lambda a: 0 * a, arrays), donate_argnums=0)
    jax.block_until_ready(wipe(given))
    assert all(array.is_deleted() for array in given.values())
    on_host = {name: array.copy() for name, array in new[1].items()}
    assert ids_of(engine) == new_ids
    engine.update_weights(on_host)
    for array in on_host.values():
        array[:] = 0
    assert ids_of(engine) == new_ids


def test_parameters_are_written_in_place(engine, new):
    engine.update_weights(new[1])
    before = [param.unsafe_buffer_pointer() for param in engine._loop.runner.params]
    held = state_of(new[0])
    engine.update_weights(held)
    assert [param.unsafe_buffer_pointer() for param in engine._loop.runner.params] == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(held)), "they are the caller's"


def test_no_prefix_outlives_its_weights(engine, new, new_ids):
    cached = lambda: engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)["meta_info"][
        "cached_tokens"
    ]
    assert cached() == 0 or cached() == 8
    assert cached() == 8
    engine.update_weights(new[1])
    assert engine._loop.scheduler.kv.tree.num_evictable == 0
    assert ids_of(engine) == new_ids
    assert cached() == 8
    engine.update_weights(new[1], flush_cache=False)
    assert cached() == 8


def test_a_stream_goes_on_with_the_new_weights(engine, new, old_ids, naive_new):
    streams = [
        engine.generate(input_ids=prompt, sampling_params=LONG, stream=True)
        for prompt in PROMPTS[:2]
    ]
    firsts = [next(stream)["output_ids"][0] for stream in streams]
    assert firsts == [ids[0] for ids in old_ids[:2]]
    result = engine.update_weights_from_disk(str(new[0]))
    assert result.success and result.num_paused_requests == 2
    for prompt, stream in zip(PROMPTS, streams, strict=False):
        *_, last = stream
        ids = last["output_ids"]
        assert len(ids) == 200 and last["meta_info"]["total_retractions"] == 1
        fits = [naive_new(prompt + ids[:n], 1) == ids[n : n + 1] for n in range(200)]
        num_old = 200 - fits[::-1].index(False)  # from here on all are the new model's
        assert 1 <= num_old < 150
        again = engine.generate(
            input_ids=prompt + ids[:num_old], sampling_params=LONG | {"max_new_tokens": 40}
        )
        assert again["output_ids"] == ids[num_old : num_old + 40]
        cached = again["meta_info"]["cached_tokens"]
        assert cached >= len(prompt) + num_old - 4, "what it left is of the new weights"


def test_an_update_of_several_calls_counts_as_one(engine, new, new_ids, naive_new):
    tensors = list(new[1].items())
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params=LONG, stream=True)
    next(stream)
    assert engine.begin_weight_update().success
    with pytest.raises(RuntimeError, match="an update has begun already"):
        engine.begin_weight_update()
    waiting = InBackground(engine, lambda: ids_of(engine))
    settle(engine)
    num_steps = engine._loop.num_steps
    for first in range(0, len(tensors), 4):
        result = engine.update_weights_from_tensor(tensors[first : first + 4])
        assert result.success and "0 running" in result.message
    engine.pause_generation("in_place")
    engine.continue_generation()  # which has no say in this
    time.sleep(0.05)
    assert engine._loop.num_steps == num_steps and waiting.result is None
    assert "1 running requests are read anew" in engine.end_weight_update().message
    assert waiting.join().result == new_ids
    *_, last = stream
    ids = last["output_ids"]
    fits = [naive_new(PROMPTS[0] + ids[:n], 1) == ids[n : n + 1] for n in range(200)]
    assert fits[::-1].index(False) > 50, "from here on all are the new model's"
    with pytest.raises(RuntimeError, match="no update has begun"):
        engine.end_weight_update()
    with pytest.raises(ValueError, match="selector: expected 'all' or 'target'.*'draft'"):
        engine.begin_weight_update("draft")


def test_without_a_flush_a_stream_keeps_what_it_has_computed(engine, new):
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params=LONG, stream=True)
    next(stream)
    assert engine.update_weights(new[1], flush_cache=False).success
    *_, last = stream
    assert last["meta_info"]["total_retractions"] == 0 and len(last["output_ids"]) == 200


def test_results_tell_the_version_of_the_weights_they_ended_with(engine, new):
    version = lambda result: result["meta_info"]["weight_version"]
    stream = engine.generate(input_ids=[1], sampling_params=LONG, stream=True)
    assert version(next(stream)) == "default"
    engine.update_weights({UP: new[1][UP]}, weight_version="step 1")
    *_, last = stream
    assert version(last) == "step 1"
    engine.update_weights({UP: new[1][UP]})
    assert version(engine.generate(input_ids=[1], sampling_params=GREEDY)) == "step 1"
    assert engine.get_server_info()["weight_version"] == "step 1"
    assert engine.server_args.weight_version == "default"


def test_weights_are_told_by_name(engine, old):
    for name, tensor in old[1].items():
        assert engine.get_weights_by_name(name, 3) == tensor[:3].tolist()
    assert len(engine.get_weights_by_name("model.embed_tokens.weight")) == 100
    qkv = np.array(engine.get_weights_by_name("layers.0.attention.qkv"))
    assert qkv.shape == (2, 4, 16, 64)
    assert engine.get_weights_by_name("model.layers.7.mlp.up_proj.weight") is None


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_of_every_family_has_its_shape(family):
    config = tiny_config(family, num_hidden_layers=11)
    ours = ModelConfig.from_dict(config.to_dict())
    params = nnx.state(nnx.eval_shape(lambda: models.build(ours)))
    parts = named_parts(params, models.checkpoint_pieces(ours))
    from tiny import random_tensors

    tensors = random_tensors(config)
    assert {name: parts[name].tensor_shape for name in tensors} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    numbers = [parts[".".join(map(str, path))].parameter for path, _ in nnx.to_flat_state(params)]
    leaves, tree = jax.tree.flatten(params)
    numbered = jax.tree.unflatten(tree, range(len(leaves)))
    assert [leaf.get_value() for _, leaf in nnx.to_flat_state(numbered)] == numbers


def test_an_update_that_fails_halfway_stops_generation_until_another_succeeds(
    engine, new, new_ids, monkeypatch
):
    def fail(array: jax.Array) -> jax.Array:
        raise MemoryError("no room")

    copies = engine._started.occupation._copies
    of, made = copies.of, []

    def of_or_fail(change: Any) -> Any:
        made.append(change)
        return fail if len(made) == 3 else of(change)

    stream = engine.generate(input_ids=[1], sampling_params=LONG, stream=True)
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no room"):
        patch.setattr(copies, "of", of_or_fail)
        engine.update_weights(new[1])
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["message"] == (
        "an update of the weights failed halfway"
    )
    with pytest.raises(RuntimeError, match=f"^{len(new[1])} tensors of the weights, such as lm_"):
        ids_of(engine)
    engine.update_weights(new[1])
    assert ids_of(engine) == new_ids


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("init_weights_update_group", r"update_weights\(\)"),
        ("destroy_weights_update_group", r"update_weights\(\)"),
        ("update_weights_from_distributed", "update_weights_from_disk"),
        ("update_weights_from_ipc", "update_weights_from_disk"),
        ("load_lora_adapter", "merge the adapter"),
        ("load_lora_adapter_from_tensors", "merge the adapter"),
        ("unload_lora_adapter", "merge the adapter"),
    ],
)
def test_what_does_not_exist_says_what_to_use(shared, method, instead):
    with pytest.raises(NotImplementedError, match=instead):
        getattr(shared, method)("any", key="thing")


def test_an_engine_that_has_ended_takes_no_weights(make_engine):
    engine = make_engine()
    engine.shutdown()
    for use in (
        lambda: engine.update_weights({"norm": np.ones(64, np.float32)}),
        lambda: engine.get_weights_by_name("norm"),
        engine.release_memory_occupation,
        engine.resume_memory_occupation,
    ):
        with pytest.raises(RuntimeError, match="was shut down"):
            use()
