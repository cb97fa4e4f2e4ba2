"""What one module means for a tower: convolutions of it, a norm or activation between them, or its end."""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import activation, batchnorm, instancenorm
from torch.nn.parameter import is_lazy

from .sources import own_functions, parse

_NORMS = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_NOT_ELEMENTWISE = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
_ACTIVATIONS = tuple(getattr(activation, n) for n in activation.__all__ if n not in _NOT_ELEMENTWISE)
# Norms and activations of other libraries share no base class: FrozenBatchNorm2d, NaiveGroupNorm, HSwish, …
_NORM_OR_ACTIVATION = re.compile(r"(Norm(Act)?(\d[dD])?(List)?|ReLU\d?|Swish|SiLU|Mish|GELU|HSigmoid|Clamp)$")
_FUNCTIONS = {"conv2d", "relu", "relu_", "leaky_relu", "silu", "gelu", "hardswish", "mish"}
_QUESTIONS = {"numel", "size", "dim"}  # methods that read a tensor's shape
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.NamedExpr)
_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.AugAssign, ast.Subscript, ast.Tuple, ast.List, ast.Dict, ast.ListComp)


@dataclass(frozen=True)
class Layer:
    """convolutions: in order; none where the module stands between those of a tower or ends it.
    ends: why it ends a tower, "" where it does not. is_convolution: whether a reader would call it one."""

    convolutions: tuple[nn.Conv2d, ...] = ()
    ends: str = ""
    is_convolution: bool = False


def read_layer(module: nn.Module | None, trusted: bool = False) -> Layer:
    """What `module` means for a tower. trusted: a wrapper of one convolution is no more than that convolution."""
    if isinstance(module, nn.Conv2d):
        ends = _misfit(module) or ("" if trusted else _does_more(module))
        return Layer(() if ends else (module,), ends, is_convolution=True)
    if module is None:
        return Layer(ends=a_kind(module))
    forward = vars(module).get("forward", type(module).forward)
    if isinstance(module, nn.Sequential) and forward is nn.Sequential.forward:
        return _several([read_layer(child, trusted) for child in module._modules.values()])
    if _is_norm_or_activation(module):
        return Layer()
    kind = a_kind(module)
    parts = [read_layer(child, trusted) for child in _children(module)]
    convolutions = sum(max(len(part.convolutions), part.is_convolution) for part in parts)
    layer = _several(parts)
    owns_tensors = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
    unlike_a_wrapper = isinstance(module, nn.Sequential) or owns_tensors or forward is nn.Module.forward
    if not parts or convolutions > 1 or unlike_a_wrapper or (layer.ends and not convolutions):
        return Layer(ends=kind, is_convolution=re.search("Conv|DCN", kind) is not None)
    if layer.ends:
        return Layer(ends=f"{kind}: {layer.ends}", is_convolution=True)
    more = "" if trusted and convolutions else _does_more(module)
    return Layer(ends=more, is_convolution=layer.is_convolution) if more else layer


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
    others = [child for child in _children(conv) if not _is_norm_or_activation(child)]
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


def _is_norm_or_activation(module: nn.Module) -> bool:
    if isinstance(module, (nn.Identity, *_NORMS, *_ACTIVATIONS)):
        return True
    named_so = _NORM_OR_ACTIVATION.search(type(module).__name__) is not None
    return named_so and not any(isinstance(m, nn.Conv2d) for m in module.modules())


def _children(module: nn.Module) -> list[nn.Module]:
    """Children, but for the parametrizations (weight norm) of the module's own tensors."""
    return [child for name, child in module._modules.items() if child is not None and name != "parametrizations"]


def _does_more(module: nn.Module) -> str:
    """What module's forward may do beyond applying its children to one value in turn, or ""."""
    if "forward" in vars(module):
        return f"{a_kind(module)} with a forward put on it: name it with `where`"
    for function in (f for name, f in own_functions(type(module)) if name == "forward"):
        tree = parse(function)
        forward = tree.body[0] if tree else None
        more = _first_doubt(forward, module) if isinstance(forward, ast.FunctionDef) else "its forward has no source"
        if more:
            what = "convolution" if any(isinstance(m, nn.Conv2d) for m in module.modules()) else "norm"
            return f"{a_kind(module)} that may be more than a {what} ({more}): name it with `where`"
    return ""


def _first_doubt(forward: ast.FunctionDef, module: nn.Module) -> str:
    """The first expression that computes with the input and is neither a call of a child nor an activation, or ""."""
    positional = [arg.arg for arg in forward.args.args]
    required = positional[1 : len(positional) - len(forward.args.defaults)]
    if len(required) != 1:
        return f"forward({', '.join(positional)})"
    tensors = set(required)

    def touched(node: ast.AST) -> bool:
        return any(isinstance(leaf, ast.Name) and leaf.id in tensors for leaf in ast.walk(node))

    for _ in range(2):  # twice, for what a loop carries back
        for node in ast.walk(forward):
            if isinstance(node, _ASSIGNMENTS) and node.value and touched(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                tensors |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    tensors.discard("self")
    for node in ast.walk(forward):
        if isinstance(node, ast.Call):
            known = _is_known(node.func, module, touched) or not touched(node)
        else:
            known = not (isinstance(node, _ARITHMETIC) and touched(node))
        if not known:
            return f"`{ast.unparse(node)[:80]}`"
    return ""


def _is_known(function: ast.AST, module: nn.Module, touched: Callable[[ast.AST], bool]) -> bool:
    """Whether function is a child of module, torch's convolution or activation, super().forward or asks for a shape."""
    if isinstance(function, ast.Subscript):
        return ast.unparse(function.value) == "self" and isinstance(module, nn.ModuleList)
    if not isinstance(function, ast.Attribute):
        return False
    of = ast.unparse(function.value)
    if of == "self":
        given = vars(module).get(function.attr)  # detectron2's Conv2d(activation=F.relu)
        if given is not None:
            return getattr(given, "__name__", "") in _FUNCTIONS
        return not inspect.isroutine(inspect.getattr_static(type(module), function.attr, None))
    if of == "super()":
        return function.attr == "forward"
    if touched(function.value):
        return function.attr in _QUESTIONS
    return function.attr in _FUNCTIONS and of.split(".")[0] in ("F", "torch", "nn")
