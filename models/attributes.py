"""Reads a checkpoint's JSON; each attribute is understood, known to be irrelevant, or refused.
It knows how to ask for a value, not what any model means by it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

REQUIRED = object()


class Attributes:
    """The attributes of one JSON object. Taking one removes it; `finish` refuses what is left."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.left = dict(values)
        self.where = where

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of `name`, null included; `default` where it is absent."""
        if name not in self.left and default is REQUIRED:
            raise ValueError(f"{self.where} lacks {name!r}: expected the checkpoint to define it")
        return self.left.pop(name, default)

    def count(self, name: str, default: Any = REQUIRED) -> int:
        """A positive integer. Null counts as absent."""
        value = self._or_default(name, default)
        self._refuse_unless(_is_index(value) and value > 0, name, "a positive integer", value)
        return value

    def optional_count(self, name: str, default: int | None) -> int | None:
        """A positive integer, or null."""
        if self.left.get(name, default) is None:
            return self.take(name, None)
        return self.count(name, default)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A positive number. Null counts as absent."""
        value = self._or_default(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        self._refuse_unless(is_number and 0 < value < math.inf, name, "a positive number", value)
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None where it is null or absent."""
        return self.take(name, None) if self.left.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false. Null counts as absent."""
        value = self._or_default(name, default)
        self._refuse_unless(isinstance(value, bool), name, "true or false", value)
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or null: as a tuple."""
        value = self.take(name, None)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        self._refuse_unless(all(map(_is_index, ids)), name, "token ids", value)
        return ids

    def expect(self, name: str, *accepted: Any) -> None:
        """Take `name` if it is there, and refuse any value but `accepted`."""
        if name in self.left and (value := self.left.pop(name)) not in accepted:
            raise ValueError(
                f"{self.where}: {name} = {value!r} is not supported, only "
                f"{' or '.join(map(repr, accepted))}; use a checkpoint without it"
            )

    def finish(self, irrelevant: Collection[str] = ()) -> None:
        """Raise ValueError naming every attribute that nobody took."""
        unknown = sorted(set(self.left) - set(irrelevant))
        if unknown:
            raise ValueError(
                f"{self.where} has attributes that are not understood, and ignoring them could "
                f"give wrong text: {', '.join(f'{n} = {self.left[n]!r}' for n in unknown)}; "
                "remove them if they are known not to matter"
            )

    def _or_default(self, name: str, default: Any) -> Any:
        if name in self.left and self.left[name] is None:
            del self.left[name]
        return self.take(name, default)

    def _refuse_unless(self, accepted: bool, name: str, expected: str, value: Any) -> None:
        if not accepted:
            raise ValueError(
                f"{self.where}: {name}: expected {expected}, got {value!r}; correct the config"
            )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
