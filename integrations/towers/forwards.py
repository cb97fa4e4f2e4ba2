"""What a module's forward does with its one input, read from its source: whether it is more than a tower's layer.

A wrapper of one convolution, a norm and an activation call their children, torch's elementwise functions and norms,
and functions of their own that do; they may compute with values that the input is reduced to, such as a mean.
"""

import ast
import builtins
import functools
import inspect
import itertools
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import activation, batchnorm, instancenorm

from .sources import forward_of, parse, stored

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
_PLACES = re.compile("arange|bernoulli|linspace|meshgrid|normal|rand|randint|randn|randperm")  # what differs by place
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
    if forward_of(module) is None:
        return Doubt("a forward put on it, or a __call__ of its own", certain=False)
    doubts = list(_Reader(module, type(module), {}, {}, {}).method("forward", type(module).__mro__, [0, 2]))
    return next((doubt for doubt in doubts if doubt.certain), doubts[0] if doubts else None)


@dataclass
class _Reader:
    """Reads one function of `module`. A value's kind is 2 for one of the input's shape, 1 for what is reduced from
    it, 0 for all else; a name's is the highest of the values that it may hold. done: how often the functions that were
    read, and the calls in them, may apply the convolution; 2 stands for more, too."""

    module: nn.Module
    owner: type  # of the method
    globals: dict[str, object]
    kinds: dict[str, int]
    done: dict[object, set[int]]

    @functools.cached_property
    def wraps(self) -> bool:
        """Whether the module is or holds a convolution."""
        return any(isinstance(module, nn.Conv2d) for module in self.module.modules())

    def method(self, name: str, classes: Sequence[type], kinds: list[int]) -> Generator[Doubt, None, set[int]]:
        owner = next((base for base in classes if name in vars(base)), object)
        function = vars(owner).get(name)
        if owner.__module__.split(".")[0] != "torch":
            is_static = isinstance(function, staticmethod)
            return (yield from self.function(getattr(function, "__func__", function), kinds[is_static:], owner))
        if owner is not nn.Conv2d and function not in FORWARDS:
            yield Doubt(f"`{owner.__name__}.{name}`", certain=True)
        elif owner is nn.Conv2d and type(self.module)._conv_forward is not nn.Conv2d._conv_forward:
            yield Doubt(f"`{type(self.module).__name__}._conv_forward`", certain=False)
        return {int(owner is nn.Conv2d)}

    def function(self, function: object, kinds: list[int], owner: type) -> Generator[Doubt, None, set[int]]:
        """The doubts about a function that is given values of these kinds."""
        is_forward, tree = not self.done, parse(function) if isinstance(function, FunctionType) else None
        if function in self.done:
            return self.done[function]
        self.done[function] = {0, 2}  # in a call of itself
        if not tree or not isinstance(tree.body[0], ast.FunctionDef):
            name = "its forward" if is_forward else getattr(function, "__name__", str(function))
            yield Doubt(f"{name} has no source", certain=False)
            return {0}
        takes = tree.body[0].args
        if is_forward and (takes.vararg or len(takes.args) - len(takes.defaults) != 2):
            yield Doubt(f"forward({ast.unparse(takes)})", certain=not takes.vararg)
            return {0}
        code = inspect.unwrap(function)  # whose source was read
        if code is not function and not function.__globals__["__name__"].startswith("torch."):
            yield Doubt(f"a decorator of {function.__name__}", certain=False)
        names = dict(zip([name.arg for name in takes.args], kinds, strict=False))
        hidden = dict.fromkeys(code.__code__.co_varnames + code.__code__.co_freevars, _OTHER)
        reader = _Reader(self.module, owner, vars(builtins) | code.__globals__ | hidden, names, self.done)
        nodes = list(reader._running(tree.body[0]))
        before = None
        while before != names:  # again, for what a loop carries back
            before = dict(names)
            for node in nodes:
                value = node.iter if isinstance(node, ast.For) else getattr(node, "value", None)
                if isinstance(node, _ASSIGNMENTS) and value:
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        names |= {n.id: max(names.get(n.id, 0), reader._kind(value)) for n in stored(target)}
        rebound = {name.id for name in stored(tree.body[0])}
        for node in nodes:
            given = getattr(node.value, "id", "self") if isinstance(node, ast.Return) else "self"
            if is_forward and self.wraps and given == takes.args[1].arg and given not in rebound:
                yield Doubt(f"`return {given}`, its input", certain=True)
            for doubt in reader._doubts(node, is_forward):
                said = f"`{' '.join(ast.unparse(node).split())[:80]}`"
                yield doubt if isinstance(doubt, Doubt) else Doubt(said, doubt)
        self.done[function] = reader._times(tree.body[0].body)
        if is_forward and self.wraps and self.done[function] != {1}:
            yield Doubt("its convolution is not certainly called once", certain=False)
        return self.done[function]

    def _times(self, nodes: list[ast.AST], turns: int = 1) -> set[int]:
        """How often code that runs `turns` times may apply the convolution, on any way through it."""
        times = {0}
        for node in reversed(nodes):
            test = getattr(node, "test", None) if isinstance(node, (ast.If, ast.IfExp)) else None
            ways = [w if isinstance(w, list) else [w] for w in (node.body, node.orelse)] if test else []
            if turns > 1 and isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
                times = _sums(self._times(ways[0]), self._times(ways[1], turns), times)  # one turn is meant
            elif test:
                truth, behind = self._truth(test), times
                times = set()
                for way in ways if truth is None else ways[:1] if truth else ways[1:]:
                    leaves = any(isinstance(n, ast.Return) for part in way for n in ast.walk(part))
                    times |= _sums(self._times(way, turns), {0} if leaves else behind)
            elif isinstance(node, ast.Raise):
                times = set()
            else:
                inside = 2 if isinstance(node, (ast.For, ast.While, *_SCOPES)) else turns
                own = {n * turns for n in self.done.get(node, {0})}
                times = _sums(own, self._times(list(ast.iter_child_nodes(node)), inside), times)
        return times

    def _doubts(self, node: ast.AST, is_forward: bool) -> Iterator[bool | Doubt]:
        """Doubts about a node; True and False stand for a Doubt of the node itself, certain or not."""
        kind = self._kind(
            node.value if isinstance(node, (ast.Return, ast.Subscript, ast.Assign)) and node.value else node
        )
        if isinstance(node, ast.Return) and is_forward and node.value:
            if isinstance(node.value, _DISPLAYS) or kind < 2:
                yield kind > 0
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
            if self._mixes(operands) or (isinstance(node.op, ast.MatMult) and kind == 2):
                yield True
        elif kind == 2 and isinstance(node, (ast.Subscript, *_SCOPES)):
            yield isinstance(node, ast.Subscript)
        elif kind == 2 and isinstance(node, ast.Attribute) and node.attr in ("H", "T", "mH", "mT"):
            yield True
        elif kind == 2 and any(isinstance(n, (ast.Attribute, ast.Subscript)) for n in getattr(node, "targets", ())):
            yield False  # put into a list, kept on the module

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
        if isinstance(node, ast.Subscript) and isinstance(row := self._resolve(node.value), nn.Module):
            return row._modules.get(str(getattr(node.slice, "value", None)), row)
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
        reduces = isinstance(node, ast.Call) and kinds.count(2) < 2 and self._is_reduction(node.func)
        return min(max(kinds, default=0), 1 if reduces else 2)

    def _is_reduction(self, func: ast.AST) -> bool:
        """Whether func is torch's or a tensor's: a child may have such a name, as `self.norm` does."""
        is_tensors = isinstance(func, ast.Attribute) and self._kind(func.value) > 0
        return bool(_REDUCTIONS.fullmatch(_last_name(func))) and (is_tensors or id(self._resolve(func)) in _TORCH)

    def _mixes(self, operands: list[ast.AST]) -> bool:
        """Whether a wrapper computes with what its convolution gave and what it got."""
        maps = [operand for operand in operands if self._kind(operand) == 2]
        names = [{n.id for n in ast.walk(m) if isinstance(n, ast.Name) and self.kinds.get(n.id) == 2} for m in maps]
        calls = any(word in ast.unparse(m) for m in maps for word in ("self.", "super()"))
        return self.wraps and len(maps) > 1 and (calls or any(name != names[0] for name in names))

    def _call(self, node: ast.Call) -> Iterator[bool | Doubt]:
        func, args = node.func, [*node.args, *(keyword.value for keyword in node.keywords)]
        kinds = [self._kind(arg) for arg in args]
        of = func.value if isinstance(func, ast.Attribute) else func
        called = self._resolve(func)
        called = called.func if isinstance(called, functools.partial) else called
        name = _TORCH.get(id(called), "")
        if isinstance(func, ast.Attribute) and self._kind(of) == 2 and not _QUESTIONS.fullmatch(func.attr):
            name, args = func.attr, [of, *args]
        elif 2 not in kinds or _is_size(node):
            yield from [True] * bool(_PLACES.fullmatch(name))
            return
        if name == "conv2d":
            self.done[node] = {1}
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
        elif ast.unparse(of) == "super()":
            behind = type(self.module).__mro__[type(self.module).__mro__.index(self.owner) + 1 :]
            self.done[node] = yield from self.method(_last_name(func), behind, [0, *kinds])
        elif (
            isinstance(called, FunctionType)
            and not node.keywords
            and not (called.__module__ or "").startswith("torch.")
        ):
            if ast.unparse(of) == "self" and _last_name(func) not in vars(self.module):
                self.done[node] = yield from self.method(_last_name(func), type(self.module).__mro__, [0, *kinds])
            else:
                self.done[node] = yield from self.function(called, kinds, self.owner)
        elif not (called is _CHILD or called in list(self.module.modules())) or len(args) != 1:
            yield False
        elif isinstance(called, nn.Module):
            self.done[node] = {int(any(isinstance(module, nn.Conv2d) for module in called.modules()))}


_OTHER, _CHILD = object(), object()


def _sums(*times: set[int]) -> set[int]:
    return {min(sum(each), 2) for each in itertools.product(*times)}


def _last_name(function: ast.AST) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _is_size(node: ast.AST) -> bool:
    """A number of elements, taken to be above 0, or a question after the type."""
    if isinstance(node, ast.Call):
        return _last_name(node.func) in ("len", "numel", "size", "isinstance", "is_tensor")
    return isinstance(node, ast.Subscript) and _last_name(node.value) == "shape"
