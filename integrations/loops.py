"""How a model applies the children of a container: read from the source of the classes that hold it.

`for conv in self.convs: x = conv(x)` applies them one after the other; a feature pyramid's `[self.convs[i](x[i])
for i in …]` applies one to each level. Both hold the same nn.ModuleList, and only the source tells them apart. A
use is taken for in order only where every mention of the container is one of a few that are understood.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .sources import methods_that_run

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
_LEAVES = (ast.Break, ast.Continue, ast.Return, ast.Yield, ast.YieldFrom)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NOT_SHOWN = "no source shows how its elements are applied: name it with `where`"


@dataclass(frozen=True)
class Use:
    """How the children of a container are applied.

    in_order: True where one value passes through them in turn, False where they are certainly used otherwise,
      None where the source does not tell.
    breaks: positions before which a loop does something else to the value (SOLO resizes it there).
    reason: why in_order is not True.
    """

    in_order: bool | None
    breaks: frozenset[int] = frozenset()
    reason: str = ""


def read_use(model: nn.Module, path: str) -> Use:
    """How `model` applies the children of its container at `path` ("" for the model itself)."""
    names = path.split(".") if path else []
    above = _modules_to(model, names)
    outer = len(names)  # where the outermost of the containers around it is
    while outer and isinstance(above[outer - 1], _CONTAINERS):
        outer -= 1
    inside = above[outer:]
    by_itself = [_Reader(module, None) for module in inside]
    held = _Reader(inside[0], names[outer - 1] if outer else "")
    for reader, module in zip(by_itself, inside, strict=True):
        reader.read(module)
    for holder in reversed(above[:outer]):
        held.read(holder)

    own = [by_itself[-1], held] if len(inside) == 1 else [by_itself[-1]]
    for reader in (*own, *by_itself, held):
        if reader.otherwise and reader in own:
            return _other_use(reader.otherwise)
        if reader.doubt or reader.otherwise:
            return _unknown_use(reader.doubt or reader.otherwise)
    applied = held.applied or not held.has_source
    for module, reader in zip(inside, by_itself, strict=True):
        if type(module).forward not in (nn.Sequential.forward, nn.Module.forward):
            applied = applied and reader.applied
        elif module is inside[-1] and not isinstance(module, nn.Sequential):
            applied = held.applied and held in own
    if not applied:
        return Use(None, reason=_NOT_SHOWN)
    return Use(True, frozenset().union(*(reader.breaks for reader in own)))


def read_list_use(model: nn.Module, path: str, attribute: str) -> Use:
    """How `model` applies those children of its module at `path` that this holds in the plain list `attribute`, too.

    detectron2's heads of 0.1 and those written after them add each layer by its name and walk a list.
    """
    above = _modules_to(model, path.split(".") if path else [])
    holder = above[-1]
    layers = vars(holder)[attribute]
    named = {name: child for name, child in holder._modules.items() if child in layers}
    by_list, by_name = _Reader(layers, attribute), _Reader(holder, None, set(named))
    alone = {name: _Reader(child, name) for name, child in named.items()}
    for module in reversed(above):
        for reader in (by_list, by_name, *alone.values()):
            reader.read(module)
    calls = [f"{name} is called by itself" for name, reader in alone.items() if reader.applied]
    if by_list.otherwise or calls:
        return _other_use(by_list.otherwise or calls[0])
    doubt = by_list.doubt or by_name.doubt or by_name.otherwise
    if doubt:
        return _unknown_use(doubt)
    return Use(True, frozenset(by_list.breaks)) if by_list.applied else Use(None, reason=_NOT_SHOWN)


def may_be_read(model: nn.Module, path: str, attribute: str) -> bool:
    """Whether a method of the module at `path`, or of one above it, may use what it holds as `attribute`."""
    above = _modules_to(model, path.split(".") if path else [])
    reader = _Reader(vars(above[-1])[attribute], attribute)
    for module in above:
        reader.read(module)
    return reader.applied or bool(reader.doubt or reader.otherwise)


def _modules_to(model: nn.Module, names: list[str]) -> list[nn.Module]:
    return [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]


def _other_use(said: str) -> Use:
    return Use(False, reason=f"its elements are not applied one after the other: {said}")


def _unknown_use(said: str) -> Use:
    return Use(None, reason=f"an unknown use, name it with `where`: {said}")


def _is_name(node: ast.AST | None, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and (name is None or node.id == name)


class _Reader:
    """Gathers what methods say of one container: as `….<attribute>`, or (None) as `self` and of its children's names.

    names: which children's; all, unless given.
    """

    def __init__(self, container: nn.Module | list[nn.Module], attribute: str | None, names: set[str] | None = None):
        self.container, self.attribute = container, attribute
        self.names = container._modules if attribute is None and names is None else names
        self.has_source = self.applied = False
        self.doubt = self.otherwise = ""
        self.breaks: set[int] = set()

    def read(self, holder: nn.Module) -> None:
        """Reads the methods of one module that holds the container, or of the container itself."""
        self.holder = holder
        if "forward" in vars(holder):
            self.doubt = f"{type(holder).__name__} has a forward put on it"
        for method, tree in methods_that_run(type(holder)):
            self.has_source = True
            if tree is None:
                self.doubt = self.doubt or f"{method} has no source"
                continue
            self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(tree):
                if self._mentions(node):
                    self._judge(method, node)

    def _mentions(self, node: ast.AST) -> bool:
        if self.attribute is None:
            is_own = self.holder is self.container
            if isinstance(node, ast.Attribute) and (of := self._resolve(node.value)) is self.container:
                return node.attr in self.names or node.attr in _CHILDREN
            if isinstance(node, ast.Attribute):
                return node.attr in self.names and of is None and not is_own
            return is_own and _is_name(node, "self") and not isinstance(self.parents[node], ast.Attribute)
        if isinstance(node, ast.Call) and _is_name(node.func, "getattr"):
            return any(isinstance(a, ast.Constant) and a.value == self.attribute for a in node.args)
        is_attribute = isinstance(node, ast.Attribute) and node.attr == self.attribute
        return is_attribute and any(self._resolve(node) is it for it in (None, self.container))

    def _resolve(self, node: ast.AST) -> object:
        """The module or list that `self.a.b` is, None where that does not show."""
        if _is_name(node, "self"):
            return self.holder
        of = self._resolve(node.value) if isinstance(node, ast.Attribute) else None
        if not isinstance(of, nn.Module):
            return None
        return of._modules.get(node.attr, vars(of).get(node.attr))

    def _is_list(self, node: ast.AST) -> bool:
        if self.attribute is None:
            return _is_name(node, "self")
        return isinstance(node, ast.Attribute) and node.attr == self.attribute and self._mentions(node)

    def _judge(self, method: str, node: ast.AST) -> None:
        parent = self.parents[node]
        if isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops):
            return
        if isinstance(parent, ast.Call) and _is_name(parent.func, "len"):
            return
        certain = self._resolve(node) is self.container
        whole = self.attribute is not None and isinstance(parent, ast.Call) and parent.func is node
        place, in_order = (parent, True) if whole else self._loop(node)
        if in_order:
            self.applied = self.applied or certain
            return
        said = f"{method}: `{' '.join(ast.unparse(place).split())[:120]}`"
        if certain and in_order is False:
            self.otherwise = self.otherwise or said
        else:
            self.doubt = self.doubt or said

    def _loop(self, node: ast.AST) -> tuple[ast.AST, bool | None]:
        """The statement or expression around a mention, and whether it applies the elements in order."""
        parent = self.parents[node]
        if isinstance(parent, ast.Subscript) and parent.value is node:
            call = self.parents[parent]
            if not (isinstance(call, ast.Call) and call.func is parent):
                return parent, None
            loop = self._around(call, lambda n: isinstance(n, ast.For) and _is_name(n.target))
            goes_over = loop is not None and isinstance(parent.slice, ast.Name) and self._is_range(loop, parent.slice)
            return call, bool(goes_over) and self._is_chain(loop, call, [parent])
        if isinstance(parent, ast.Assign) and any(isinstance(t, (ast.Tuple, ast.List)) for t in parent.targets):
            return parent, False
        loop = self._around(node, lambda n: isinstance(n, (ast.For, *_COMPREHENSIONS)))
        clauses = [] if loop is None else [loop] if isinstance(loop, ast.For) else loop.generators
        targets = [clause.target for clause in clauses if any(n is node for n in ast.walk(clause.iter))]
        bound = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        calls = [n for n in ast.walk(loop or node) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in bound]
        if not calls:
            return parent, None
        element = self._element(loop) if isinstance(loop, ast.For) else None
        uses = [n for n in self.parents if element and self._bound_by(n, element) in (loop, None)]
        call = next((call for call in calls if call.func in uses), None)
        return loop, call is not None and self._is_chain(loop, call, uses)

    def _around(self, node: ast.AST, is_it: Callable[[ast.AST], bool]) -> ast.AST | None:
        while node is not None and not is_it(node):
            node = self.parents.get(node)
        return node

    def _bound_by(self, node: ast.AST, name: str) -> ast.AST | bool | None:
        """The loop that gives `name` its value where node reads it; None where none does, False for another node."""
        if not (_is_name(node, name) and isinstance(node.ctx, ast.Load)):
            return False

        def binds(loop: ast.AST) -> bool:
            clauses = [loop] if isinstance(loop, ast.For) else getattr(loop, "generators", [])
            return any(_is_name(n, name) for clause in clauses for n in ast.walk(clause.target))

        return self._around(node, binds)

    def _is_range(self, loop: ast.For, index: ast.Name) -> bool:
        """loop is `for <index> in range(<length of the list>)`."""
        over = loop.iter
        if not (_is_name(loop.target, index.id) and isinstance(over, ast.Call) and _is_name(over.func, "range")):
            return False
        if len(over.args) != 1 or not self._keeps_places():
            return False
        length = over.args[0]
        if isinstance(length, ast.Call) and _is_name(length.func, "len"):
            return any(map(self._is_list, length.args))
        return self._value(length) == len(self.container)

    def _keeps_places(self) -> bool:
        """In a Sequential a tower's other names go, which only a loop without an index does not notice."""
        return not isinstance(self.container, nn.Sequential)

    def _element(self, loop: ast.For) -> str | None:
        """The name of the current element in `loop`, where `loop` goes over the whole list."""
        over, target = loop.iter, loop.target
        if self._is_list(over):
            return target.id if isinstance(target, ast.Name) else None
        if not (isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and isinstance(target, ast.Tuple)):
            return None
        place = next((i for i, argument in enumerate(over.args) if self._is_list(argument)), None)
        if over.func.id == "enumerate" and len(over.args) == 1 and not over.keywords and place == 0:
            name = target.elts[1]
        elif over.func.id == "zip" and place is not None and all(map(self._is_as_long, over.args)):
            name = target.elts[place]
        else:
            return None
        return name.id if isinstance(name, ast.Name) else None

    def _is_as_long(self, node: ast.AST) -> bool:
        other = self._resolve(node)
        return (
            self._keeps_places()
            and isinstance(other, (nn.ModuleList, nn.Sequential, list))
            and len(other) == len(self.container)
        )

    def _value(self, node: ast.AST) -> object:
        """The value of a constant or of an attribute of self."""
        if isinstance(node, ast.Attribute) and _is_name(node.value, "self"):
            return vars(self.holder).get(node.attr, inspect.getattr_static(type(self.holder), node.attr, None))
        return node.value if isinstance(node, ast.Constant) else None

    def _is_chain(self, loop: ast.For, call: ast.Call, uses: list[ast.AST]) -> bool:
        """One statement of the loop applies the element, `x = element(x)`, and no other meets the element or x."""
        links = [s for s in loop.body if isinstance(s, ast.Assign) and any(n is call for n in ast.walk(s))]
        if len(uses) != 1 or len(links) != 1 or loop.orelse or any(isinstance(n, _LEAVES) for n in ast.walk(loop)):
            return False
        link, target = links[0], links[0].targets[0]
        takes = len(call.args) == 1 and not call.keywords and isinstance(target, ast.Name)
        if not takes or len(link.targets) != 1 or not _is_name(call.args[0], target.id):
            return False
        if link.value is not call and not self._is_relu_of(link.value, call):
            return False
        breaks: set[int] = set()
        for position, statement in enumerate(loop.body):
            if statement is link or not any(_is_name(n, target.id) for n in ast.walk(statement)):
                continue
            where = self._guard(statement, loop)
            if where is None or position > loop.body.index(link):
                return False
            breaks.add(where)
        self.breaks |= breaks
        return True

    def _guard(self, statement: ast.stmt, loop: ast.For) -> int | None:
        """k, where the statement is `if i == k: …` on the loop's index i."""
        if not (isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare) and self._keeps_places()):
            return None
        is_enumerate = isinstance(loop.iter, ast.Call) and loop.iter.func.id == "enumerate"
        index, test = loop.target.elts[0] if is_enumerate else None, statement.test
        if statement.orelse or not _is_name(index) or not _is_name(test.left, index.id) or len(test.ops) != 1:
            return None
        k = self._value(test.comparators[0]) if isinstance(test.ops[0], ast.Eq) else None
        return k if isinstance(k, int) else None

    def _is_relu_of(self, node: ast.AST, call: ast.Call) -> bool:
        """relu(call): harmless where nn.Identity takes a vacated place, a second ReLU changing nothing."""
        if not (isinstance(node, ast.Call) and node.args == [call] and isinstance(node.func, ast.Attribute)):
            return False
        if _is_name(node.func.value, "self"):
            return isinstance(self.holder._modules.get(node.func.attr), (nn.ReLU, nn.ReLU6))
        return ast.unparse(node.func) in ("F.relu", "F.relu_", "torch.relu", "torch.relu_")
