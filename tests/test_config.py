import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxengine import config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAXENGINE_CACHE_DIR", raising=False)
    return tmp_path


def test_cache_dir_is_made_under_the_home_folder_for_the_user_alone(home: Path) -> None:
    folder = config.cache_dir()
    assert folder == home / ".cache" / "jaxengine"
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700


def test_cache_dir_follows_xdg_and_then_our_own_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert config.cache_dir() == home / "xdg" / "jaxengine"
    monkeypatch.setenv("JAXENGINE_CACHE_DIR", "~/mine")
    assert config.cache_dir() == home / "mine"


def test_a_cache_dir_that_everybody_can_write_to_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = home / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("JAXENGINE_CACHE_DIR", str(shared))
    with pytest.warns(UserWarning, match="everybody can write to it.*JAXENGINE_CACHE_DIR"):
        assert config.cache_dir() is None


def test_a_cache_dir_of_somebody_else_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to user"):
        assert config.cache_dir() is None


def test_a_cache_dir_that_is_a_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("JAXENGINE_CACHE_DIR", str(home / "file"))
    with pytest.warns(UserWarning, match="File exists"):
        assert config.cache_dir() is None


def _configured(env: dict[str, str], before: str = "") -> list[str]:
    """Compile cache and memory fractions as a fresh process sees them after `configure_jax`."""
    program = f"""
import os, jax
{before}
from jaxengine.config import configure_jax
configure_jax(memory_fraction=0.5)
print(jax.config.jax_compilation_cache_dir)
print(os.environ.get("XLA_CLIENT_MEM_FRACTION"))
print(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
"""
    unset = {
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "JAX_COMPILATION_CACHE_DIR",
    }
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_configure_jax_sets_what_the_user_left_open(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert _configured({"JAXENGINE_CACHE_DIR": folder}) == [f"{folder}/jax", "0.500", "None"]


def test_configure_jax_keeps_what_the_user_has_set(tmp_path: Path) -> None:
    theirs = {
        "JAXENGINE_CACHE_DIR": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": "/theirs",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3",
    }
    assert _configured(theirs) == ["/theirs", "None", "0.3"]


def test_configure_jax_keeps_a_cache_set_in_the_program(tmp_path: Path) -> None:
    before = 'jax.config.update("jax_compilation_cache_dir", "/theirs")'
    env = {"JAXENGINE_CACHE_DIR": str(tmp_path), "XLA_CLIENT_MEM_FRACTION": "0.7"}
    assert _configured(env, before) == ["/theirs", "0.7", "None"]
