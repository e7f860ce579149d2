"""Finding a model's folder; each way of not finding it is one clear error."""

import time

import pytest

from jaxengine.hub import CHECKPOINT_FILES, OTHER_FORMATS, read_json, resolve_model


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model("~/model") == tmp_path / "model"


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json.*holds nothing"):
        resolve_model(str(tmp_path))


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="got the file"):
        resolve_model(str(path))


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c", "models/x/"]
)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(path):
    with pytest.raises(ValueError, match="there is no folder"):
        resolve_model(path)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing-of-that-name"])
def test_an_unreachable_hub_is_one_error_within_seconds(name, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{name}.*cannot be reached.*pass a local folder"):
        resolve_model(name, download_dir=str(tmp_path))
    assert time.monotonic() - start < 10


def test_of_the_folders_in_a_repository_only_those_of_modules_are_fetched():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "1_Pooling/config.json", "2_D/model.safetensors"]
    others = [
        "onnx/config.json",
        "original/tokenizer.model",
        "consolidated.safetensors",
        "2_D/x.bin",
    ]
    found = filter_repo_objects(
        [*wanted, *others],
        allow_patterns=list(CHECKPOINT_FILES),
        ignore_patterns=list(OTHER_FORMATS),
    )
    assert list(found) == wanted


def test_a_name_the_hub_cannot_have_is_refused():
    with pytest.raises(ValueError, match="expected `owner/name`"):
        resolve_model("what is this")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path)
