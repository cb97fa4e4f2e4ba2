"""What one layer is to a tower: convolutions of it, a norm or activation between them, or its end."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, instancenorm
from torch.nn.parameter import is_lazy

from ifr_fast import IFRHead

from .walks import read_walk

_NORMS = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_NOT_ELEMENTWISE = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
_ACTIVATIONS = tuple(getattr(activation, n) for n in activation.__all__ if n not in _NOT_ELEMENTWISE)
# Norms and activations of other libraries share no base class: FrozenBatchNorm2d, NaiveGroupNorm, HSwish, …
_NORM_OR_ACTIVATION = re.compile(r"(Norm(Act)?(\d[dD])?(List)?|ReLU\d?|Swish|SiLU|Mish|GELU|HSigmoid|Clamp)$")


@dataclass(frozen=True)
class Layer:
    """convolutions: those of a tower, in order; none where the layer is between them or ends the tower.
    ends: why it ends a tower, "" where it does not. is_convolution: whether a reader would call it one."""

    convolutions: tuple[nn.Conv2d, ...] = ()
    ends: str = ""
    is_convolution: bool = False


def read_layer(module: nn.Module | None) -> Layer:
    """What `module` is to a tower that it might belong to."""
    if isinstance(module, nn.Conv2d):
        misfit = _misfit(module) or _changes_shape(module, module)
        return Layer(ends=misfit, is_convolution=True) if misfit else Layer((module,), is_convolution=True)
    if isinstance(module, nn.Sequential) and _applies_in_order(module):
        return _several([read_layer(child) for child in module._modules.values()])
    if _is_norm_or_activation(module):
        return Layer()
    kind = a_kind(module)
    parts = [] if isinstance(module, IFRHead) else [read_layer(child) for child in _children(module)]
    convolutions = sum(max(len(part.convolutions), part.is_convolution) for part in parts)
    if convolutions != 1 or _owns_tensors(module):
        return Layer(ends=kind, is_convolution=re.search("Conv|DCN", kind) is not None)
    layer = _several(parts)
    misfit = layer.ends or _changes_shape(module, layer.convolutions[0])
    return Layer(ends=f"{kind}: {misfit}", is_convolution=True) if misfit else layer


def a_kind(module: nn.Module | None) -> str:
    """The class of module, with its article."""
    kind = type(module).__name__
    return f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"


def _several(parts: list[Layer]) -> Layer:
    """Layers applied one after the other, as one."""
    is_convolution = any(part.is_convolution for part in parts)
    ends = next((part.ends for part in parts if part.ends), "")
    convolutions = tuple(conv for part in parts for conv in part.convolutions)
    channels = {conv.in_channels for conv in convolutions}
    if not ends and len(channels) > 1:
        ends = f"convolutions of {' and '.join(map(str, sorted(channels)))} channels"
    if ends:
        # Several convolutions in a Sequential are looked at there, not as one layer here.
        return Layer(ends=ends, is_convolution=sum(part.is_convolution for part in parts) == 1)
    return Layer(convolutions, is_convolution=is_convolution)


def _misfit(conv: nn.Conv2d) -> str:
    """Why conv can be no part of a tower, or ""."""
    if is_lazy(conv.weight):
        return "a convolution not yet initialised: run the model once"
    others = [child for child in _children(conv) if not _is_norm_or_activation(child)]
    if others:
        return f"{a_kind(conv)} holding {a_kind(others[0])}"
    if conv.kernel_size != (3, 3):
        return "a {}×{} convolution".format(*conv.kernel_size)
    for odd, said in (
        (conv.stride != (1, 1), f"stride {conv.stride[0]}"),
        (conv.dilation != (1, 1), f"dilation {conv.dilation[0]}"),
        (conv.groups != 1, f"{conv.groups} groups"),
        (conv.padding not in ((1, 1), "same"), f"padding {conv.padding}"),
        (conv.padding_mode != "zeros", f"padding_mode {conv.padding_mode!r}"),
        (conv.in_channels != conv.out_channels, f"{conv.in_channels} → {conv.out_channels} channels"),
    ):
        if odd:
            return f"a 3×3 convolution with {said}"
    return ""


def _is_norm_or_activation(module: nn.Module | None) -> bool:
    if isinstance(module, (nn.Identity, *_NORMS, *_ACTIVATIONS)):
        return True
    named_so = module is not None and _NORM_OR_ACTIVATION.search(type(module).__name__)
    return bool(named_so) and not any(isinstance(m, nn.Conv2d) for m in module.modules())


def _applies_in_order(module: nn.Sequential) -> bool:
    if type(module).forward is nn.Sequential.forward:
        return True
    walk = read_walk(module, None, len(module))
    return walk.in_order is True and not walk.breaks


def _children(module: nn.Module | None) -> list[nn.Module]:
    """Children, but for the parametrizations (weight norm) of the module's own tensors."""
    if module is None:
        return []
    return [child for name, child in module._modules.items() if child is not None and name != "parametrizations"]


def _owns_tensors(module: nn.Module | None) -> bool:
    return module is None or any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _changes_shape(module: nn.Module, conv: nn.Conv2d) -> str:
    """What a forward of the model's own does to the shape of a small input, "" where it keeps it."""
    if type(module).forward is nn.Conv2d.forward:
        return ""
    modes = {m: m.training for m in module.modules()}
    x = conv.weight.new_zeros(1, conv.in_channels, 5, 7)
    try:
        with torch.no_grad():
            y = module.eval()(x)
    except Exception as error:  # code of any kind runs here; whatever it raises, its layer stays
        return f"its forward cannot be tried on {tuple(x.shape)} ({type(error).__name__}: {error})"
    finally:
        for m, training in modes.items():
            m.training = training
    shape = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
    return "" if shape == tuple(x.shape) else f"its forward takes {tuple(x.shape)} to {shape}"
