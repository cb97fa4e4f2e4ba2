"""Reads the authors' checkpoints (github.com/lufanma/IFR) under this package's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def released_state(
    state_dict: Mapping[str, Tensor], prefix: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a matching IFRHead, completed from `options`, and its block's state dict. Parameters and errors
    are those of IFRHead.from_released."""
    if not isinstance(state_dict, Mapping) or not isinstance(prefix, str):
        found = f"{type(state_dict).__name__} and {prefix!r}"
        raise ValueError(f"state_dict and prefix are a {found}: expected a mapping of tensors and a string")
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    options = {"groups": 4, "form": "released", **options}
    layers = (1, 2) if options["form"] == "paper" else (1, 2, 3)
    norms = [f"gn{i}.{name}" for i in layers for name in ("weight", "bias")]
    names = {name: name for name in norms}  # our names to theirs
    for conv in ("conv1", "conv2"):
        if options.setdefault("weight_norm", prefix + "conv1.weight_g" in state_dict):
            names[f"{conv}.parametrizations.weight.original0"] = f"{conv}.weight_g"
            names[f"{conv}.parametrizations.weight.original1"] = f"{conv}.weight_v"
        else:
            names[f"{conv}.weight"] = f"{conv}.weight"
    missing = [prefix + name for name in names.values() if prefix + name not in state_dict]
    if missing:
        found = [k for k in state_dict if k.endswith(("conv1.weight_g", "conv1.weight"))][:3]
        raise ValueError(f"prefix={prefix!r}: the state dict has no {', '.join(missing)}; it has e.g. {found}")
    mid_channels, channels = state_dict[prefix + names.get("conv1.weight", "conv1.weight_v")].shape[:2]
    sizes = {"channels": channels, "mid_channels": mid_channels}
    for name, size in sizes.items():
        if options.get(name, size) != size:
            raise ValueError(f"{name}={options[name]!r}: the checkpoint has {size}")
    options |= sizes
    return options, {ours: state_dict[prefix + theirs] for ours, theirs in names.items()}
