"""How a model applies the children of a container: read from the source of the classes that hold it.

`for conv in self.convs: x = conv(x)` applies one after the other, a feature pyramid's `[self.convs[i](x[i]) for i in
…]` one to each level. Both hold the same nn.ModuleList: only the source tells them apart. A container is taken for a
chain only where every mention of it is understood (class _Reader).
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from .loops import NOT_IN_TURN, ONE_BY_ONE, Loop, Verdict
from .mentions import CHILDREN, Mentions, clauses, elements
from .sources import forward_of, methods_that_run, stored

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVE_ALONE = {"eval", "named_parameters", "parameters", "requires_grad_", "state_dict", "train", "training"}
_UNKNOWN = "an unknown use, name it with `where`: "
_NOT_SHOWN = "no source shows how its elements are applied: name it with `where`"


@dataclass(frozen=True)
class Use:
    """How the children of a container are applied.

    in_order: True where one value passes through them in turn, False where they are certainly used otherwise,
      None where the source does not tell.
    breaks: positions before which a loop does something else to the value (SOLO resizes it there).
    reason: why in_order is not True.
    by_place: whether their places may count, as those of an index do.
    """

    in_order: bool | None
    breaks: frozenset[int] = frozenset()
    reason: str = ""
    by_place: bool = True


def read_use(model: nn.Module, path: str) -> Use:
    """How `model` applies the children of its container at `path` ("" for the model itself)."""
    above, names = _modules_to(model, path), path.split(".")
    outer = len(above) - 1  # where the outermost of the containers around it is
    while outer and isinstance(above[outer - 1], _CONTAINERS):
        outer -= 1
    inside = above[outer:]
    by_itself = [_Reader(Mentions(module, None)) for module in inside]
    attribute = names[outer - 1] if outer else ""
    held = _Reader(Mentions(inside[0], attribute))
    followed = _Reader(Mentions(inside[-1], attribute, keys=names[outer:], within=inside[0], aliases=True))
    for reader, module in zip(by_itself, inside, strict=True):
        reader.read(module)
    for holder in reversed(above[:outer]):
        held.read(holder)
        followed.read(holder)

    own = [by_itself[-1], held] if len(inside) == 1 else [by_itself[-1]]
    for reader in (*own, followed):
        if reader.otherwise:
            return Use(False, reason=reader.otherwise)
    for reader in (*by_itself, held):
        if reader.doubt or reader.otherwise:
            return Use(None, reason=_UNKNOWN + (reader.doubt or reader.otherwise.partition(": ")[2]))
    applied = held.applied or not held.has_source
    for module, reader in zip(inside, by_itself, strict=True):
        if forward_of(module) not in (nn.Sequential.forward, nn.Module.forward):
            applied = applied and reader.applied
        elif module is inside[-1] and not isinstance(module, nn.Sequential):
            applied = held.applied and held in own
    if not applied:
        return Use(None, reason=_NOT_SHOWN)
    breaks = frozenset[int]().union(*(reader.breaks for reader in own))
    return Use(True, breaks, by_place=any(reader.by_place for reader in own))


def read_list_use(model: nn.Module, path: str, attribute: str) -> Use:
    """How `model` applies those children of its module at `path` that this also holds in the plain list `attribute`.

    detectron2's heads of 0.1, and heads written after them, add each layer by its name and walk a list.
    """
    above = _modules_to(model, path)
    holder = above[-1]
    layers = vars(holder)[attribute]
    named = {name: child for name, child in holder._modules.items() if child is not None and child in layers}
    by_list, followed = (_Reader(Mentions(layers, attribute, aliases=aliases)) for aliases in (False, True))
    by_name = _Reader(Mentions(holder, None, set(named)))
    alone = {name: _Reader(Mentions(child, name)) for name, child in named.items()}
    for module in reversed(above):
        for reader in (by_list, followed, by_name, *alone.values()):
            reader.read(module)
    calls = [f"{ONE_BY_ONE}{name} is called by itself" for name, reader in alone.items() if reader.applied]
    otherwise = [by_list.otherwise, followed.otherwise, *calls]
    if any(otherwise):
        return Use(False, reason=next(filter(None, otherwise)))
    doubt = by_list.doubt or by_name.doubt or by_name.otherwise
    if doubt:
        return Use(None, reason=_UNKNOWN + doubt)
    return Use(True, frozenset(by_list.breaks)) if by_list.applied else Use(None, reason=_NOT_SHOWN)


def may_be_read(model: nn.Module, path: str, attribute: str) -> bool:
    """Whether a method of the module at `path`, or of one above it, may use what it holds as `attribute`."""
    above = _modules_to(model, path)
    reader = _Reader(Mentions(vars(above[-1])[attribute], attribute))
    for module in above:
        reader.read(module)
    return reader.applied or bool(reader.doubt or reader.otherwise)


def _modules_to(model: nn.Module, path: str) -> list[nn.Module]:
    """model, the module at path, and those between."""
    return list(accumulate(path.split(".") if path else [], nn.Module.get_submodule, initial=model))


class _Reader:
    """Judges every mention of one container in the methods of the modules that hold it.

    integrations/README.md lists what is understood. In order, no other statement of the loop meets the element or x,
    and nothing leaves the loop early. A ReLU may stand around the call: in a place that holds nn.Identity it is
    repeated, which changes nothing. A mention that may be another's (`net.convs`, where net is a local name) makes
    nothing certain, and local names are followed only to uses that are certainly other ones.

    Attributes: applied, whether the elements are applied in order somewhere. otherwise, doubt: the first certain other
    use and the first unknown one, "" for none. breaks, by_place: as Use's. has_source: whether there was a method.
    """

    def __init__(self, mentions: Mentions) -> None:
        self.mentions = mentions
        self.has_source = self.applied = self.by_place = False
        self.doubt = self.otherwise = ""
        self.breaks: set[int] = set()

    def read(self, holder: nn.Module) -> None:
        """Reads the methods of one module that holds the container, or of the container itself."""
        if "forward" in vars(holder):
            self.doubt = f"{type(holder).__name__} has a forward put on it"
        for method, tree in methods_that_run(type(holder)):
            self.has_source = True
            if tree is None:
                self.doubt = self.doubt or f"{method} has no source"
                continue
            for node in list(self.mentions.enter(holder, tree)):
                self._judge(method, node)

    def _judge(self, method: str, node: ast.AST) -> None:
        place, verdict = self._verdict(node)
        if verdict is None:
            return
        certain = self.mentions.is_certain(node)
        if verdict.in_order:
            self.applied, self.breaks = self.applied or certain, self.breaks | verdict.breaks
            return
        said = f"{method}: `{' '.join(ast.unparse(place).split())[:120]}`"
        if not certain or verdict.in_order is None:
            self.doubt = self.doubt or said
        elif not self.otherwise or (verdict.why == NOT_IN_TURN and self.otherwise.startswith(ONE_BY_ONE)):
            self.otherwise = verdict.why + said

    def _verdict(self, node: ast.AST) -> tuple[ast.AST, Verdict | None]:
        """The code around a mention, and what it shows; None for no use."""
        parent, is_own = self.mentions.parents[node], self.mentions.attribute is None
        if self.mentions.is_around(node):
            return parent, Verdict(None)
        match parent:
            case ast.Compare(ops=ops) if all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops):
                return parent, None
            case ast.Call(func=ast.Name(id="len")):
                self.by_place = self.by_place or not is_own
                return parent, None
            case ast.Call(func=func) if func is node and not is_own:
                return parent, Verdict(True)
            case ast.Attribute(attr=name) if not is_own and self._is_no_child(name):
                return parent, None
            case ast.Assign(targets=targets) if any(isinstance(t, (ast.Tuple, ast.List)) for t in targets):
                return parent, Verdict(False, ONE_BY_ONE)
            case ast.Subscript(value=of, slice=index) if of is node and not isinstance(index, ast.Slice):
                call = self.mentions.parents[parent]
                self.by_place = True
                loop = self._around(parent, {n.id for n in ast.walk(index) if isinstance(n, ast.Name)})
                return call, Loop(loop, self.mentions).judge()
        loop = next((up for up in self._above(node) if isinstance(up, _LOOPS)), None)
        walked = [over for clause in clauses(loop) for _, over in elements(clause.target, clause.iter)]
        by_name = is_own and isinstance(node, ast.Attribute) and node.attr not in CHILDREN
        if by_name or not any(map(self.mentions.is_container, walked)):
            return parent, Verdict(None)
        read = Loop(loop, self.mentions)
        self.by_place = self.by_place or read.counts() or not any(clause.iter is node for clause in clauses(loop))
        return loop, read.judge()

    def _is_no_child(self, name: str) -> bool:
        """Whether the container's attribute `name` shows nothing of its children: a method of its own is read, too."""
        container = self.mentions.container
        if not isinstance(container, nn.Module) or name in container._modules or name in ("forward", *CHILDREN):
            return False
        owner = next((base for base in type(container).__mro__ if name in vars(base)), None)
        return name in _LEAVE_ALONE or owner is None or owner.__module__.split(".")[0] != "torch"

    def _above(self, node: ast.AST | None) -> Iterator[ast.AST]:
        while (node := self.mentions.parents.get(node)) is not None:
            yield node

    def _around(self, node: ast.AST, names: set[str]) -> ast.AST:
        """The innermost loop around node that changes one of these names, else the method."""
        for up in self._above(node):
            changed = [clause.target for clause in clauses(up)] + [up] * isinstance(up, ast.While)
            if isinstance(up, ast.FunctionDef) or names & {name.id for node in changed for name in stored(node)}:
                return up
        return self.mentions.method.body[0]
