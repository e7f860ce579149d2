"""Where a checkpoint lies: the embedded model, a local folder, or one commit of a hub repository.
It finds folders and reads their JSON; what the files say is for others."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
CHECKPOINT_FILES = ("*.safetensors", *TOKENIZER_FILES)
OTHER_FORMATS = ("[!0-9]*/*", "consolidated*")
"""The same weights once more; but folders with a number are the modules of an embedding model."""

HUB_TIMEOUT_SECONDS = 5.0


def resolve_model(
    model_path: str | Path | None,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> Path:
    """The folder of a checkpoint, downloaded if need be; `None` is the embedded model.

    Everything else about the model (tokenizer, template) is to be read from this folder, so that
    all of it is of one revision. Raises ValueError where there is no such model, or no way to it.
    """
    if model_path is None:
        folder = Path(str(files("jaxengine"))) / "assets" / "demo"
    else:
        folder = resolve_folder(
            model_path, CHECKPOINT_FILES, revision=revision, download_dir=download_dir
        )
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:10]) or "nothing"
        raise ValueError(
            f"model_path: expected a folder with a config.json, got {folder.absolute()}, which "
            f"holds {found}; pass the folder that config.json and the safetensors files lie in"
        )
    return folder


def resolve_folder(
    path: str | Path,
    patterns: tuple[str, ...],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    field: str = "model_path",
) -> Path:
    """`path` where it is a local folder, else the snapshot of the hub repository of that name."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{field}: expected a folder, got the file {folder}; pass its folder")
    if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:
        raise ValueError(f"{field}: there is no folder {folder}; check the spelling")
    try:
        return _snapshot(str(path), patterns, revision, download_dir)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{field}: {str(path)!r} is no local folder (looked in {Path.cwd()}), and fetching it "
            f"from the Hugging Face hub failed: {_explain(error, revision)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, naming the file, where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _snapshot(
    repository: str, patterns: tuple[str, ...], revision: str | None, download_dir: str | None
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repository,
        revision=revision,
        cache_dir=download_dir,
        allow_patterns=list(patterns),
        ignore_patterns=list(OTHER_FORMATS),
        etag_timeout=HUB_TIMEOUT_SECONDS,
    )
    return Path(folder)


def _explain(error: Exception, revision: str | None) -> str:
    """What went wrong at the hub, and the way out."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is gated; accept its terms on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such repository; check the spelling, or log in (`hf auth login`) if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; check the spelling"
    if isinstance(error, errors.HFValidationError):
        return "that cannot be a repository's name; expected `owner/name`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = str(error).partition("\n")[0].removeprefix("Got: ")
        return f"it cannot be reached and has no copy in the cache ({reason}); pass a local folder"
    return f"{str(error).partition(chr(10))[0]}; pass a local folder"
