"""What a module's forward does with its one input, read from its source: whether it is more than a tower's layer.

A wrapper of one convolution, a norm and an activation call their children, torch's elementwise functions and norms,
and functions of their own that do; they may compute with values that the input is reduced to, such as a mean.
"""

import ast
import builtins
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import activation, batchnorm, instancenorm

from .sources import parse

NORMS = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_MIXING = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
_ACTIVATIONS = [getattr(activation, name) for name in activation.__all__ if name not in _MIXING]
# Those of torch's own norms and activations.
FORWARDS = {kind.forward for kind in (nn.Identity, nn.SyncBatchNorm, *NORMS, *_ACTIVATIONS)}

# torch's functions and the methods of a tensor, by what becomes of a map
_ELEMENTWISE = re.compile(
    "(abs|add|bfloat16|celu|clamp|clamp_max|clamp_min|clip|clone|contiguous|detach|div|double|elu|erf|exp|float|gelu|half"
    "|hardsigmoid|hardswish|hardtanh|leaky_relu|log|log1p|logsigmoid|maximum|minimum|mish|mul|neg|pow|prelu|reciprocal"
    "|relu|relu6|rrelu|rsqrt|selu|sigmoid|silu|softplus|softsign|sqrt|square|sub|tanh|tanhshrink|threshold|to|type"
    "|true_divide|type_as|where|(batch|group|instance|layer|local_response)_norm|normalize)_?"
)
_REDUCTIONS = re.compile("amax|amin|max|mean|min|norm|std|std_mean|sum|var|var_mean")
_RESHAPES = re.compile("permute|reshape|transpose|view")  # may be undone further on
_QUESTIONS = re.compile(
    "device|dim|dtype|is_contiguous|is_cuda|is_floating_point|ndim|new_empty|new_zeros|numel|requires_grad|shape|size|stride"
)
_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # how F.conv2d goes on, and its defaults
_TORCH = {id(getattr(space, name)): name for space in (torch, F) for name in dir(space)}
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For)
_DISPLAYS = (ast.Tuple, ast.List, ast.Dict, ast.Set)
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.Await, ast.Yield)


class Doubt(NamedTuple):
    """said: the code that does more, or may. certain: it does, whatever is known to who names the module."""

    said: str
    certain: bool


def read_forward(module: nn.Module) -> Doubt | None:
    """Why module's forward may be more than its children and elementwise functions, or None."""
    if "forward" in vars(module):
        return Doubt("a forward put on it", certain=False)
    doubts = list(_method(module, "forward", type(module).__mro__, [0, 2], set()))
    return next((doubt for doubt in doubts if doubt.certain), doubts[0] if doubts else None)


def _method(
    module: nn.Module, name: str, classes: tuple[type, ...], kinds: list[int], done: set[object]
) -> Iterator[Doubt]:
    owner = next((base for base in classes if name in vars(base)), object)
    if owner.__module__.split(".")[0] != "torch":
        yield from _function(module, vars(owner).get(name), owner, kinds, done)
    elif owner is not nn.Conv2d and vars(owner).get(name) not in FORWARDS:
        yield Doubt(f"`{owner.__name__}.{name}`", certain=True)
    elif owner is nn.Conv2d and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        yield Doubt(f"`{type(module).__name__}._conv_forward`", certain=False)


def _function(
    module: nn.Module, function: object, owner: type | None, kinds: list[int], done: set[object]
) -> Iterator[Doubt]:
    """The doubts about a function given values of these kinds. owner: the class, of a method; done: what was read."""
    is_forward = not done
    if function in done:
        return
    done.add(function)
    tree = parse(function) if isinstance(function, FunctionType) else None
    if not tree or not isinstance(tree.body[0], ast.FunctionDef):
        name = "its forward" if is_forward else getattr(function, "__name__", str(function))
        yield Doubt(f"{name} has no source", certain=False)
        return
    takes = tree.body[0].args
    if is_forward and (takes.vararg or len(takes.args) - len(takes.defaults) != 2):
        yield Doubt(f"forward({ast.unparse(takes)})", certain=not takes.vararg)
        return
    names = dict(zip([name.arg for name in takes.args], kinds, strict=False))
    body = _Body(module, owner, vars(builtins) | function.__globals__, names, done)
    for node, doubt in body.read(tree.body[0], is_forward):
        said = f"`{' '.join(ast.unparse(node).split())[:80]}`"
        yield doubt if isinstance(doubt, Doubt) else Doubt(said, doubt)


@dataclass
class _Body:
    """A function's body. A value's kind is 2 for one of the input's shape, 1 for what is reduced from it, 0 for all
    else; a name's is the highest of the values that it may hold."""

    module: nn.Module
    owner: type | None
    globals: dict[str, object]
    kinds: dict[str, int]
    done: set[object]

    def read(self, definition: ast.FunctionDef, is_forward: bool) -> Iterator[tuple[ast.AST, bool | Doubt]]:
        nodes = list(self._running(definition))
        for _ in range(2):  # twice, for what a loop carries back
            for node in nodes:
                value = node.iter if isinstance(node, ast.For) else getattr(node, "value", None)
                if isinstance(node, _ASSIGNMENTS) and value:
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        for name in (
                            n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                        ):
                            self.kinds[name] = max(self.kinds.get(name, 0), self._kind(value))
        for node in nodes:
            if isinstance(node, ast.Return) and is_forward and node.value:
                if isinstance(node.value, _DISPLAYS) or self._kind(node.value) < 2:
                    yield node, self._kind(node.value) > 0
            elif isinstance(node, ast.Call):
                yield from ((node, doubt) for doubt in self._call(node))
            elif isinstance(node, (ast.BinOp, ast.AugAssign)):
                operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
                if self._mixes(operands) or (isinstance(node.op, ast.MatMult) and self._kind(node) == 2):
                    yield node, True
            elif isinstance(node, ast.Subscript) and self._kind(node.value) == 2:
                yield node, True
            elif isinstance(node, _SCOPES) and self._kind(node) == 2:
                yield node, False
            elif isinstance(node, ast.Assign) and not all(isinstance(n, (ast.Name, ast.Tuple)) for n in node.targets):
                yield from [(node, False)] * (self._kind(node.value) == 2)  # put into a list, kept on the module

    def _running(self, node: ast.AST) -> Iterator[ast.AST]:
        """node and what is below, but for branches that no input reaches that is not empty."""
        yield node
        truth = self._truth(node.test) if isinstance(node, (ast.If, ast.IfExp)) else None
        skipped = None if truth is None else node.orelse if truth else node.body
        for _, part in ast.iter_fields(node):
            for child in part if isinstance(part, list) else [part]:
                if isinstance(child, ast.AST) and part is not skipped:
                    yield from self._running(child)

    def _truth(self, test: ast.AST) -> bool | None:
        """Whether test holds, None where that does not show."""
        match test:
            case ast.UnaryOp(op=ast.Not()):
                truth = self._truth(test.operand)
                return None if truth is None else not truth
            case ast.BoolOp():
                decides, truths = isinstance(test.op, ast.Or), [self._truth(value) for value in test.values]
                return decides if decides in truths else None if None in truths else not decides
            case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=None)]):
                known = isinstance(op, (ast.Is, ast.IsNot)) and self._resolve(left) is not _OTHER
                return (self._resolve(left) is None) == isinstance(op, ast.Is) if known else None
            case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=0)]) if _is_size(left):
                return {ast.Eq: False, ast.LtE: False, ast.NotEq: True, ast.Gt: True}.get(type(op))
        value = self._resolve(test)
        return True if _is_size(test) else value if value is None or isinstance(value, bool) else None

    def _resolve(self, node: ast.AST) -> object:
        """What the code names, as far as it does not change: _OTHER where that does not show."""
        if isinstance(node, ast.Name):
            return self.module if node.id == "self" else self.globals.get(node.id, _OTHER)
        if isinstance(node, ast.Subscript) and isinstance(self._resolve(node.value), nn.Module):
            return _CHILD
        if not isinstance(node, ast.Attribute) or node.attr == "training":
            return _OTHER
        of = self._resolve(node.value)
        if isinstance(of, (ModuleType, type)):
            return getattr(of, node.attr, _OTHER)
        if of is not self.module:
            return of if isinstance(of, nn.Module) and node.attr == "forward" else _OTHER
        held = vars(of) | of._modules | of._parameters | of._buffers
        found = held.get(node.attr, inspect.getattr_static(type(of), node.attr, _OTHER))
        return _CHILD if isinstance(found, property) else getattr(found, "__func__", found)

    def _kind(self, node: ast.AST) -> int:
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id, 0)
        if (isinstance(node, ast.Attribute) and _QUESTIONS.fullmatch(node.attr)) or _is_size(node):
            return 0
        if isinstance(node, ast.Subscript):
            return self._kind(node.value)
        kinds = [self._kind(child) for child in ast.iter_child_nodes(node)]
        reduces = isinstance(node, ast.Call) and _REDUCTIONS.fullmatch(_last_name(node.func)) and kinds.count(2) < 2
        return min(max(kinds, default=0), 1 if reduces else 2)

    def _mixes(self, operands: list[ast.AST]) -> bool:
        """Whether a wrapper computes with what its convolution gave and what it got."""
        maps = [operand for operand in operands if self._kind(operand) == 2]
        names = [{n.id for n in ast.walk(m) if isinstance(n, ast.Name) and self.kinds.get(n.id) == 2} for m in maps]
        calls = any(word in ast.unparse(m) for m in maps for word in ("self.", "super()"))
        wraps = any(isinstance(m, nn.Conv2d) for m in self.module.modules())
        return wraps and len(maps) > 1 and (calls or any(name != names[0] for name in names))

    def _call(self, node: ast.Call) -> Iterator[bool | Doubt]:
        """Doubts about a call that the input reaches; True and False stand for a Doubt of the call itself."""
        func, args = node.func, [*node.args, *(keyword.value for keyword in node.keywords)]
        kinds = [self._kind(arg) for arg in args]
        of = func.value if isinstance(func, ast.Attribute) else func
        called = self._resolve(func)
        called = called.func if isinstance(called, functools.partial) else called
        name = _TORCH.get(id(called), "")
        if isinstance(func, ast.Attribute) and self._kind(of) == 2 and not _QUESTIONS.fullmatch(func.attr):
            name, args = func.attr, [of, *args]
        elif 2 not in kinds or _is_size(node):
            return
        if name == "conv2d":
            given = dict(zip(_GEOMETRY, node.args[3:], strict=False)) | {k.arg: k.value for k in node.keywords}
            own = {key: getattr(self.module, key, None) for key in _GEOMETRY}
            if any(key not in given and own[key] not in (n, (n, n)) for key, n in _GEOMETRY.items()):
                yield any(isinstance(arg, ast.Starred) for arg in args) is False
            elif any(ast.unparse(value) != f"self.{key}" for key, value in given.items() if key in _GEOMETRY):
                yield False
        elif _ELEMENTWISE.fullmatch(name) or _REDUCTIONS.fullmatch(name):
            yield from [True] * self._mixes(args)
        elif name:
            yield not _RESHAPES.fullmatch(name)
        elif ast.unparse(of) == "super()" and self.owner:
            order = type(self.module).__mro__
            behind = order[order.index(self.owner) + 1 :]
            yield from _method(self.module, _last_name(func), behind, [0, *kinds], self.done)
        elif isinstance(called, FunctionType) and called.__module__.split(".")[0] != "torch" and not node.keywords:
            is_method = isinstance(func, ast.Attribute) and ast.unparse(of) == "self"
            if is_method and func.attr not in vars(self.module):
                static = inspect.getattr_static(type(self.module), func.attr)
                owner = next(base for base in type(self.module).__mro__ if func.attr in vars(base))
                kinds = kinds if isinstance(static, staticmethod) else [0, *kinds]
                yield from _function(self.module, called, owner, kinds, self.done)
            else:
                yield from _function(self.module, called, None, kinds, self.done)
        elif not (called is _CHILD or isinstance(called, nn.Module)) or len(args) != 1:
            yield False


_OTHER, _CHILD = object(), object()


def _last_name(function: ast.AST) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _is_size(node: ast.AST) -> bool:
    """A number of elements, taken to be above 0, or a question after the type."""
    if isinstance(node, ast.Call):
        return _last_name(node.func) in ("len", "numel", "size", "isinstance", "is_tensor")
    return isinstance(node, ast.Subscript) and _last_name(node.value) == "shape"
