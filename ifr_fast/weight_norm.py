"""Weight normalisation of a convolution, equivalent to torch.nn.utils.parametrizations.weight_norm(conv, dim=0). It has
the same values and the same keys in a state dict. parametrize.remove_parametrizations removes it.

Torch gives every parametrised module a class of its own, and a hook that is local to a function. So torch.compile
compiles each module anew, and none can be pickled. Here all such modules share one class.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._torch import weight_norm


class WeightNorm(nn.Module):
    """weight = gain · direction / ‖direction‖, with one norm per output channel."""

    def forward(self, gain: Tensor, direction: Tensor) -> Tensor:
        return weight_norm(gain, direction)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, 0), weight


class _Shared(type):
    """Metaclass that protects the shared class's property `weight`. remove_parametrizations deletes this property when
    it makes one convolution a plain nn.Conv2d again; the other convolutions still need it."""

    def __setattr__(cls, name: str, value: object) -> None:
        if isinstance(value, property) and name != "weight":
            raise ValueError(
                f"{name} of a convolution under IFRHead's weight norm cannot be parametrised: fold that first "
                "(parametrize.remove_parametrizations(conv, 'weight'))"
            )
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name != "weight":
            super().__delattr__(name)


class WeightNormConv2d(nn.Conv2d, metaclass=_Shared):
    """The class of the convolutions that normalised() returns."""

    parametrizations: Any  # torch's ModuleDict of ParametrizationLists

    @property
    def weight(self) -> Tensor:
        return self.parametrizations.weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.parametrizations.weight.right_inverse(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):  # torch's older names
            if prefix + old in state_dict:
                state_dict[f"{prefix}parametrizations.weight.{new}"] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def normalised(conv: nn.Conv2d) -> nn.Conv2d:
    """Reparametrises conv's weight by weight normalisation, in place. Returns conv."""
    parametrize.register_parametrization(conv, "weight", WeightNorm(), unsafe=True)
    conv.__class__ = WeightNormConv2d
    return conv


def is_torchs(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether module is a convolution parametrised by torch's own weight_norm over dimension 0, and by nothing else."""
    if not parametrize.is_parametrized(module, "weight") or type(module) is WeightNormConv2d:
        return False
    parametrizations: Any = module.parametrizations
    steps = list(parametrizations.weight)
    plain = parametrize.type_before_parametrizations(module) is nn.Conv2d and len(parametrizations) == 1
    return plain and len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm" and steps[0].dim == 0


def adopted(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy of conv with torch's weight normalisation replaced by this one. They share the tensors."""
    other = WeightNormConv2d.__new__(WeightNormConv2d)
    other.__dict__ = {**conv.__dict__, "_load_state_dict_pre_hooks": {}, "_modules": dict(conv._modules)}
    theirs: Any = conv.parametrizations
    ours: Any = normalised(nn.Conv2d(1, 1, 1, device="meta")).parametrizations
    ours.weight.original0, ours.weight.original1 = theirs.weight.original0, theirs.weight.original1
    other._modules["parametrizations"] = ours.train(conv.training)
    return other
