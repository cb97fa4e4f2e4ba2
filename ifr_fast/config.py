"""Solvers and adjoints from names and dicts (as in configuration files), and to and from JSON (for registered ops)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_CHOICES: dict[str, type[Any]] = {}


def choice(cls: type[T]) -> type[T]:
    """Registers a frozen dataclass under its name, which users may write in any case."""
    _CHOICES[cls.__name__.lower()] = cls
    return cls


def build(spec: Any, base: type[T] | tuple[type[Any], ...], argument: str) -> Any:
    """The object that `spec` means: itself, a name, or dict(type=name, …). Raises ValueError for anything else."""
    if isinstance(spec, base):
        return spec
    names = [c.__name__ for c in _CHOICES.values() if issubclass(c, base)]
    fields = {"type": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = fields.pop("type", "")
    cls: Any = _CHOICES.get(getattr(name, "__name__", str(name)).lower())
    if cls is None or not issubclass(cls, base):
        raise ValueError(
            f"{argument}={spec!r}: expected one of {', '.join(names)}, as an object, a name or dict(type=name, …)"
        )
    known = {f.name for f in dataclasses.fields(cls)}
    if not fields.keys() <= known:
        raise ValueError(f"{argument}={spec!r}: {cls.__name__} takes {', '.join(sorted(known)) or 'no options'}")
    return cls(**fields)


def encode(obj: Any) -> dict[str, Any]:
    """The options of obj as a dict of values that JSON knows. decode() turns it back into an equal object."""
    if _CHOICES.get(type(obj).__name__.lower()) is not type(obj):
        raise ValueError(
            f"{obj!r} is a {type(obj).__name__}: expected one of {', '.join(c.__name__ for c in _CHOICES.values())}"
        )
    fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    return {"type": type(obj).__name__, **{name: _plain(value) for name, value in fields.items()}}


def decode(fields: dict[str, Any]) -> Any:
    options = dict(fields)
    return _CHOICES[options.pop("type").lower()](**options)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return encode(value) if dataclasses.is_dataclass(value) else value
