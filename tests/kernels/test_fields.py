"""What compiled kernels say of the fields that they are given (csrc/fields.h): all, no others, each of its type."""

import re

import pytest

from ifr_fast import _native

POINTERS = (
    "f", "z", "value", "history", "gram", "p", "q", "step", "norms", "status", "iterations", "improved", "residual",
    "trace", "previous",
)  # fmt: skip
FIELDS = {
    **dict.fromkeys(POINTERS, 0), "type": _native.DType.f32, "history_type": _native.DType.f32,
    "method": _native.Method.picard, "n": 0, "size": 1, "rows": 1, "row": 0, "evaluation": 0, "window": 1, "rtol": 0.0,
    "divergence": 1e3, "ridge": 0.0, "affine": False, "threads": 1,
}  # fmt: skip


def test_all_fields_are_taken():
    """No samples: no address is used."""
    assert _native.step(FIELDS) == 0


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_is_named(name):
    with pytest.raises(TypeError, match=f"missing field '{name}'"):
        _native.step({key: value for key, value in FIELDS.items() if key != name})


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match="unknown field 'grams'"):
        _native.step({**FIELDS, "grams": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("f", None), ("f", -1), ("f", 0.0), ("type", 0), ("type", _native.Method.picard), ("method", "picard"),
        ("n", 1.5), ("threads", 2**40), ("rtol", "small"), ("affine", None), ("affine", 2),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(name, value):
    with pytest.raises(TypeError, match=re.escape(f"field '{name}' cannot be {value}")):
        _native.step({**FIELDS, name: value})
