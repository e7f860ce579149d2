"""A name for everything that a traced program depends on, its shapes apart: the code as it stands
in memory, so that a function which was replaced there counts too, the versions and the settings.
"""

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from types import CodeType, FunctionType
from typing import Any

import flax
import jax
import numpy as np

from jaxengine.config import xla_settings
from jaxengine.version import __version__

TRACED = (
    *("drawing", "function_params", "functions", "launch", "models", "pallas_kernels", "programs"),
    *("request_state", "sampling", "step_programs"),
)
"""The modules and packages of `jaxengine` whose code runs while a step is traced."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))


def fingerprint(device: Any) -> str:
    """Equal in two processes if what they trace for `device` is; 64 hexadecimal digits.

    What is replaced inside of other libraries is not seen.
    """
    digest = hashlib.sha256()
    versions = sys.version, jax.__version__, version("jaxlib"), flax.__version__, __version__
    kind = device.platform, device.device_kind, device.client.platform_version
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    for part in (versions, kind, sorted(map(repr, settings.items())), xla_settings()):
        digest.update(repr(part).encode())
    for module in sorted(name for name in sys.modules if _is_traced(name)):
        for part in _parts(vars(sys.modules[module]), module, {}):
            digest.update(part)
    return digest.hexdigest()


def _is_traced(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == "jaxengine" and rest.split(".")[0] in TRACED


def _parts(value: Any, home: str, seen: dict[int, Any]) -> Iterator[bytes]:
    """The bytes that stand for a value: of functions and classes their code, of data the data, of
    anything else its type."""
    if isinstance(value, PLAIN):
        yield repr(value).encode()
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that its id is nobody else's
    for part in _children(value, home):
        yield from _parts(part, home, seen)
    yield type(value).__qualname__.encode()


def _children(value: Any, home: str) -> Iterator[Any]:
    """What a value is made of. Long, as every kind of value has its case."""
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        yield from (value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__)
        yield cells
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
        if value.__module__ == home:  # others are looked into where they are at home
            yield dict(vars(value))
    elif isinstance(value, dict):
        for name in sorted(value, key=repr):
            if name not in ("__doc__", "__builtins__", "__weakref__", "__dict__"):
                yield from (name, value[name])
    elif isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(map(repr, value))
    elif isinstance(value, np.ndarray | np.generic):
        yield from (value.tobytes(), str(value.dtype), value.shape)
    elif dataclasses.is_dataclass(value):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
