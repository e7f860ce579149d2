"""Checkpoints: found, read, cast, placed, and refused by name where they do not fit."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxengine.models.interface import Piece
from jaxengine.weights import dummy_parameters, load_parameters


class Toy(nnx.Module):
    """Two parameters: one of three pieces, and a norm."""

    def __init__(self, dtype=jnp.float32):
        self.qkv = nnx.Param(
            jnp.zeros((2, 4, 3, 5), dtype), axes=("kv_heads", "qkv", "head", "embed")
        )
        self.norm = nnx.Param(jnp.zeros(5, dtype), axes=("embed",))


PIECES = {
    "qkv": (
        Piece("q.weight", np.s_[:, :2]),
        Piece("k.weight", np.s_[:, 2]),
        Piece("v.weight", np.s_[:, 3]),
    ),
    "norm": (Piece("norm.weight"),),
}


def toy(dtype=jnp.float32):
    return nnx.eval_shape(lambda: Toy(dtype))


def toy_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"q.weight": (12, 5), "k.weight": (6, 5), "v.weight": (6, 5), "norm.weight": (5,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def load(folder, dtype=jnp.float32, **kwargs):
    return load_parameters(folder, toy(dtype), PIECES, progress=False, **kwargs)


def leaf(state: Any, name: str | int) -> jax.Array:
    return state[name].get_value()


def save_shards(folder, tensors):
    weight_map = {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensors[name]}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def expected_qkv(tensors):
    q = tensors["q.weight"].reshape(2, 2, 3, 5)
    k, v = (tensors[name].reshape(2, 1, 3, 5) for name in ("k.weight", "v.weight"))
    return np.concatenate([q, k, v], axis=1)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pieces_fill_their_place_and_are_cast(tmp_path, is_sharded, stored, wanted):
    tensors = toy_tensors(stored)
    if is_sharded:
        save_shards(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    state = load(tmp_path, wanted)
    qkv = leaf(state, "qkv")
    assert isinstance(qkv, jax.Array) and qkv.dtype == wanted
    np.testing.assert_array_equal(qkv, expected_qkv(tensors).astype(wanted))
    np.testing.assert_array_equal(leaf(state, "norm"), tensors["norm.weight"].astype(wanted))


def test_the_state_merges_into_the_model_with_its_axes(tmp_path):
    save_file(toy_tensors(), tmp_path / "model.safetensors")
    graphdef, abstract = nnx.split(toy())
    state = load(tmp_path)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert nnx.merge(graphdef, state).qkv.axes == ("kv_heads", "qkv", "head", "embed")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_family_loads_from_a_folder(tmp_path, family, shards):
    tiny = pytest.importorskip("tiny")
    from jaxengine import models
    from jaxengine.hub import read_json, resolve_model
    from jaxengine.models.config import ModelConfig

    tensors = tiny.save_checkpoint(tmp_path, tiny.tiny_config(family), shards=shards)
    folder = resolve_model(str(tmp_path))
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    state = load_parameters(
        folder,
        nnx.eval_shape(lambda: models.build(config)),
        models.checkpoint_pieces(config),
        is_ignorable=lambda name: models.is_ignorable(name, config),
        progress=False,
    )
    np.testing.assert_array_equal(leaf(state, "embed_tokens"), tensors["model.embed_tokens.weight"])
    total = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert total == sum(tensor.size for tensor in tensors.values())


def test_names_may_lack_the_prefix_that_a_head_gives_them(tmp_path):
    tensors = toy_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    prefixed = {
        path: [piece._replace(name=f"model.{piece.name}") for piece in parts]
        for path, parts in PIECES.items()
    }
    state = load_parameters(tmp_path, toy(), prefixed, base_prefix="model.", progress=False)
    np.testing.assert_array_equal(leaf(state, "qkv"), expected_qkv(tensors))
    tensors["model.v.weight"] = tensors.pop("v.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.k.weight, model.norm.weight, model.q"):
        load_parameters(tmp_path, toy(), prefixed, base_prefix="model.", progress=False)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path):
    tensors = toy_tensors()
    del tensors["v.weight"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors["k.weight"] = tensors["k.weight"].T.copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    assert "missing: v.weight" in message
    assert "unexpected: extra.weight" in message
    assert "k.weight in model.safetensors is (5, 6), expected (2, 3, 5)" in message
    assert str(tmp_path) in message


def test_at_most_ten_names_are_listed(tmp_path):
    tensors = toy_tensors() | {f"extra{i:02}": np.zeros(1, np.float32) for i in range(23)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="extra09 and 13 more"):
        load(tmp_path)


def test_ignorable_tensors_are_skipped(tmp_path):
    tensors = toy_tensors() | {"rotary_emb.inv_freq": np.zeros(1, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, is_ignorable=lambda name: name.endswith("inv_freq"))


def test_quantised_tensors_are_refused(tmp_path):
    tensors = toy_tensors()
    tensors["k.weight"] = np.ones((6, 5), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not floating point.*k\.weight \(I8\)"):
        load(tmp_path)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_values_that_overflow_float16_are_an_error(tmp_path, stored):
    tensors = toy_tensors(stored)
    tensors["k.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="k.weight in .*beyond float16"):
        load(tmp_path, jnp.float16)


@pytest.mark.parametrize("kept", [0, 3, 8, 100, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(toy_tensors(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_shards(tmp_path, toy_tensors())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": "../b.safetensors"}, {"a": {}}, {"a": 1}])
def test_a_damaged_index_is_refused(tmp_path, weight_map):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(toy_tensors(), tmp_path / name)
    with pytest.raises(ValueError, match="both in"):
        load(tmp_path)


def test_pickled_checkpoints_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is refused, since unpickling runs code"
    ):
        load(tmp_path)


def test_progress_counts_the_bytes_on_stderr_or_is_silent(tmp_path, capsys):
    save_file(toy_tensors(), tmp_path / "model.safetensors")
    load(tmp_path)
    assert capsys.readouterr().err == ""
    load_parameters(tmp_path, toy(), PIECES, progress=True)
    captured = capsys.readouterr()
    assert "weights: 100%" in captured.err and captured.out == ""


def test_the_host_never_holds_the_model_twice(tmp_path):
    import tracemalloc

    class Wide(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(nnx.Param(jnp.zeros((64, 1024))) for _ in range(16))

    tensors = {f"w{i}": np.full((64, 1024), i, np.float32) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    pieces = {f"layers.{i}": (Piece(f"w{i}"),) for i in range(16)}
    one = tensors["w0"].nbytes
    tensors.clear()
    model = nnx.eval_shape(Wide)
    tracemalloc.start()
    state = load_parameters(tmp_path, model, pieces, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * one  # on the CPU the arrays of the "device" may be these very buffers
    np.testing.assert_array_equal(leaf(state["layers"], 5), 5)


def test_dummy_parameters_are_small_noise_and_norms_of_one():
    state = dummy_parameters(toy(jnp.bfloat16), seed=3)
    np.testing.assert_array_equal(leaf(state, "norm"), jnp.ones(5, jnp.bfloat16))
    qkv = np.asarray(leaf(state, "qkv"), np.float32)
    assert qkv.dtype == np.float32 and leaf(state, "qkv").dtype == jnp.bfloat16
    assert 0.01 < qkv.std() < 0.03 and abs(qkv.mean()) < 0.01
    assert state["qkv"].axes == ("kv_heads", "qkv", "head", "embed")


def test_dummy_parameters_depend_on_the_seed_and_on_the_place():
    class Pair(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Param(jnp.zeros((7, 3))) for _ in range(2))

    first, again, other = (dummy_parameters(nnx.eval_shape(Pair), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(leaf(first, "a"), leaf(again, "a"))
    assert not np.array_equal(leaf(first, "a"), leaf(other, "a"))
    assert not np.array_equal(leaf(first, "a"), leaf(first, "b"))


@pytest.mark.gpu
def test_dummy_parameters_need_no_memory_beside_themselves():
    from jaxengine.weights import _noise

    lowered = _noise.lower(jax.random.key(0), (512, 1024), jnp.dtype(jnp.bfloat16))
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes <= 4 * 512 * 1024
