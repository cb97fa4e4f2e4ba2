"""Solvers and adjoints as objects, names, dicts (for configuration files) and strings (for registered ops)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of inputs

_CHOICES: dict[str, type] = {}


def choice(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass known by its name, in any case."""
    _CHOICES[cls.__name__.lower()] = cls
    return cls


def build(spec: Any, base: type[T] | tuple[type, ...], argument: str) -> T:
    """The object that `spec` means: itself, a name, or dict(type=name, …). ValueError where it means none."""
    if isinstance(spec, base):
        return spec
    names = [c.__name__ for c in _CHOICES.values() if issubclass(c, base)]
    fields = {"type": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = fields.pop("type", "")
    cls = _CHOICES.get(getattr(name, "__name__", str(name)).lower())
    if cls is None or not issubclass(cls, base):
        raise ValueError(
            f"{argument}={spec!r}: expected one of {', '.join(names)}, as an object, a name or dict(type=name, …)"
        )
    known = {f.name for f in dataclasses.fields(cls)}
    if not fields.keys() <= known:
        raise ValueError(f"{argument}={spec!r}: {cls.__name__} takes {', '.join(sorted(known)) or 'no options'}")
    return cls(**fields)


def encode(obj: Any) -> str:
    """A string that decode() turns back into an equal object."""
    fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    fields = {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in fields.items()}
    return json.dumps({"type": type(obj).__name__, **fields})


@lru_cache(maxsize=1024)
def decode(text: str) -> Any:
    fields = json.loads(text)
    return _CHOICES[fields.pop("type").lower()](**fields)


def check_int(owner: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}({name}={value!r}): expected an integer ≥ {minimum}")


def check_tensor(name: str, value: Any) -> None:
    """ValueError unless value is a tensor of one of DTYPES."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {value!r}: expected a tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: expected a dense tensor")
    if value.dtype not in DTYPES:
        expected = "expected dtype float64, float32, bfloat16 or float16"
        raise ValueError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: {expected}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_rtol(owner: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < float("inf")):
        raise ValueError(f"{owner}(rtol={value!r}): expected None or a number ≥ 0")
