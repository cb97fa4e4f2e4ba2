"""What one module means for a tower: convolutions of it, a norm or activation between them, or its end."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .forwards import FORWARDS, NORMS, read_forward
from .sources import forward_of


@dataclass(frozen=True)
class Layer:
    """convolutions: in order; none where the module stands between those of a tower or ends it.
    ends: why it ends a tower, "" where it does not. is_convolution: whether a reader would call it one."""

    convolutions: tuple[nn.Conv2d, ...] = ()
    ends: str = ""
    is_convolution: bool = False


def read_layer(module: nn.Module | None, trusted: bool = False) -> Layer:
    """What `module` means for a tower. trusted: its forward does no more than it shows."""
    forward = forward_of(module) if module is not None else None
    kind = a_kind(module)
    if isinstance(module, nn.Conv2d):
        ends = _misfit(module) or _does_more(module, trusted)
        return Layer(() if ends else (module,), ends, is_convolution=True)
    if module is None:
        return Layer(ends=kind)
    parts = [read_layer(child, trusted) for child in _children(module)]
    layer = _several(parts)
    if isinstance(module, nn.Sequential) and forward is nn.Sequential.forward:
        return layer
    if forward in FORWARDS:
        return Layer()
    convolutions = sum(max(len(part.convolutions), part.is_convolution) for part in parts)
    is_torchs = (getattr(forward, "__module__", None) or "").split(".")[0] == "torch"
    is_wrapper = not (is_torchs or isinstance(module, nn.Sequential) or convolutions > 1 or _has_weights(module))
    if not is_wrapper or (layer.ends and not convolutions):
        return Layer(ends=kind, is_convolution=re.search("Conv|DCN", kind) is not None)
    ends = f"{kind}: {layer.ends}" if layer.ends else _does_more(module, trusted)
    return Layer(() if ends else layer.convolutions, ends, is_convolution=convolutions == 1)


def a_kind(module: nn.Module | None) -> str:
    """The class of module, with its article."""
    kind = type(module).__name__
    return f"an {kind}" if kind[0] in "AEIOU" else f"a {kind}"


def _several(parts: list[Layer]) -> Layer:
    """Layers applied one after the other, as one."""
    ends = next((part.ends for part in parts if part.ends), "")
    convolutions = tuple(conv for part in parts for conv in part.convolutions)
    channels = {conv.in_channels for conv in convolutions}
    if not ends and len(channels) > 1:
        ends = f"convolutions of {' and '.join(map(str, sorted(channels)))} channels"
    if ends:
        # A Sequential of several convolutions is read as a container of its own, not as one layer here.
        return Layer(ends=ends, is_convolution=sum(part.is_convolution for part in parts) == 1)
    return Layer(convolutions, is_convolution=bool(convolutions))


def _misfit(conv: nn.Conv2d) -> str:
    """Why conv can be no part of a tower, or ""."""
    if is_lazy(conv.weight):
        return "a convolution not yet initialised: run the model once"
    others = [child for child in _children(conv) if read_layer(child) != Layer()]
    if others:
        return f"{a_kind(conv)} holding {a_kind(others[0])}"
    if conv.kernel_size != (3, 3):
        return "a {}×{} convolution".format(*conv.kernel_size)
    odd = (
        (conv.stride != (1, 1), f"stride {conv.stride[0]}"),
        (conv.dilation != (1, 1), f"dilation {conv.dilation[0]}"),
        (conv.groups != 1, f"{conv.groups} groups"),
        (conv.padding not in ((1, 1), "same"), f"padding {conv.padding}"),
        (conv.padding_mode != "zeros", f"padding_mode {conv.padding_mode!r}"),
        (conv.in_channels != conv.out_channels, f"{conv.in_channels} → {conv.out_channels} channels"),
    )
    return next((f"a 3×3 convolution with {said}" for is_odd, said in odd if is_odd), "")


def _has_weights(module: nn.Module) -> bool:
    """Whether module itself holds a tensor of more than one number for each channel."""
    return any(is_lazy(t) or sum(size > 1 for size in t.shape) > 1 for t in tensors(module))


def tensors(module: nn.Module, recurse: bool = False) -> list[torch.Tensor]:
    """The parameters and buffers of a module, with recurse also of what is below."""
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _does_more(module: nn.Module, trusted: bool) -> str:
    """What module's forward may do beyond its children and elementwise functions, or ""."""
    doubt = read_forward(module)
    # What holds no tensor may as well resize: who names all that is around it does not say that it does not.
    can_be_named = doubt is not None and not doubt.certain and bool(tensors(module, recurse=True))
    if doubt is None or (can_be_named and (trusted or isinstance(module, NORMS))):
        return ""
    what = "convolution" if any(isinstance(m, nn.Conv2d) for m in module.modules()) else "norm or activation"
    return f"{a_kind(module)} that may be more than a {what} ({doubt.said})" + ": name it with `where`" * can_be_named


def _children(module: nn.Module) -> list[nn.Module]:
    """Children, but for the parametrizations (weight norm) of the module's own tensors."""
    return [child for name, child in module._modules.items() if child is not None and name != "parametrizations"]
