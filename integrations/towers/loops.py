"""How a model applies the children of a container: read from the source of the classes that hold it.

`for conv in self.convs: x = conv(x)` applies one after the other, a feature pyramid's `[self.convs[i](x[i]) for i in
…]` one to each level. Both hold the same nn.ModuleList: only the source tells them apart. A container is taken for a
chain only where every mention of it is understood (class _Reader).
"""

import ast
import inspect
import re
from collections.abc import Callable, Collection, Sized
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from .sources import methods_that_run

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ROWS = (nn.Sequential, nn.ModuleList, list)
_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
_LEAVES = (ast.Break, ast.Continue, ast.Return, ast.Yield, ast.YieldFrom)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_RELU = {"F.relu", "F.relu_", "torch.relu", "torch.relu_"}
_OTHERWISE = "its elements are not applied one after the other: "
_UNKNOWN = "an unknown use, name it with `where`: "
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
    above, names = _modules_to(model, path), path.split(".")
    outer = len(above) - 1  # where the outermost of the containers around it is
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
            return Use(False, reason=_OTHERWISE + reader.otherwise)
        if reader.doubt or reader.otherwise:
            return Use(None, reason=_UNKNOWN + (reader.doubt or reader.otherwise))
    applied = held.applied or not held.has_source
    for module, reader in zip(inside, by_itself, strict=True):
        if type(module).forward not in (nn.Sequential.forward, nn.Module.forward):
            applied = applied and reader.applied
        elif module is inside[-1] and not isinstance(module, nn.Sequential):
            applied = held.applied and held in own
    if not applied:
        return Use(None, reason=_NOT_SHOWN)
    return Use(True, frozenset[int]().union(*(reader.breaks for reader in own)))


def read_list_use(model: nn.Module, path: str, attribute: str) -> Use:
    """How `model` applies those children of its module at `path` that this also holds in the plain list `attribute`.

    detectron2's heads of 0.1, and heads written after them, add each layer by its name and walk a list.
    """
    above = _modules_to(model, path)
    holder = above[-1]
    layers = vars(holder)[attribute]
    named = {name: child for name, child in holder._modules.items() if child is not None and child in layers}
    by_list, by_name = _Reader(layers, attribute), _Reader(holder, None, set(named))
    alone = {name: _Reader(child, name) for name, child in named.items()}
    for module in reversed(above):
        for reader in (by_list, by_name, *alone.values()):
            reader.read(module)
    calls = [f"{name} is called by itself" for name, reader in alone.items() if reader.applied]
    if by_list.otherwise or calls:
        return Use(False, reason=_OTHERWISE + (by_list.otherwise or calls[0]))
    doubt = by_list.doubt or by_name.doubt or by_name.otherwise
    if doubt:
        return Use(None, reason=_UNKNOWN + doubt)
    return Use(True, frozenset(by_list.breaks)) if by_list.applied else Use(None, reason=_NOT_SHOWN)


def may_be_read(model: nn.Module, path: str, attribute: str) -> bool:
    """Whether a method of the module at `path`, or of one above it, may use what it holds as `attribute`."""
    above = _modules_to(model, path)
    reader = _Reader(vars(above[-1])[attribute], attribute)
    for module in above:
        reader.read(module)
    return reader.applied or bool(reader.doubt or reader.otherwise)


def _modules_to(model: nn.Module, path: str) -> list[nn.Module]:
    """model, the module at path, and those between."""
    return list(accumulate(path.split(".") if path else [], nn.Module.get_submodule, initial=model))


def _is_name(node: ast.AST | None, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and (name is None or node.id == name)


class _Reader:
    """Judges every mention of one container in the methods of the modules that hold it.

    code, where `self.convs` is the container              what is understood
    -----------------------------------------------------  ------------------------------------------------------------
    self.convs(x)                                          in order, if the container's own class applies them so
    for conv in self.convs: x = conv(x)                    in order
    for i, conv in enumerate(self.convs): x = conv(x)      in order
    for conv, b in zip(self.convs, self.bs): x = conv(x)   in order, where bs is a container or list as long
    for i in range(len(self.convs)): x = self.convs[i](x)  in order; or range(4), range(self.n), if that is the length
    x = relu(conv(x)) for x = conv(x)                      in order; relu: F.relu, torch.relu, a child nn.ReLU of self
    if i == 2: x = resize(x), ahead of x = conv(x)         in order up to there and from there; i from enumerate
    self.convs is None, len(self.convs)                    no use
    any other call of an element or of self.convs[…]       certainly another use
    a, b, c = self.convs                                   certainly another use
    all else: run(self.convs), convs = self.convs,         unknown
    self.convs[:-1], getattr(self, "convs"), a method
    without source, a forward put on the object

    In order, no other statement of the loop meets the element, none after `x = conv(x)` meets x, and nothing leaves
    the loop early. A ReLU may stand around the call: in a place that holds nn.Identity it is repeated, which changes
    nothing. In an nn.Sequential a tower's other places go, so range, zip and `i == 2` are no order there. A mention
    that may be another's (`net.convs`, where net is a local name) makes nothing certain.

    Args:
        container: an nn.Sequential, nn.ModuleList, plain list or single layer.
        attribute: its name in the modules that hold it. None: `self` in its own class, and its children's names.
        names: the children that count, where not all do.

    Attributes: applied, whether the elements are applied in order somewhere. otherwise, doubt: the first certain other
    use and the first unknown one, "" for none. breaks: as Use's. has_source: whether there was a method to read.
    """

    def __init__(
        self, container: nn.Module | list[nn.Module], attribute: str | None, names: Collection[str] = ()
    ) -> None:
        self.container, self.attribute = container, attribute
        self.names = names or (container._modules if isinstance(container, nn.Module) else ())
        # A Sequential loses the names of a tower's other layers: a loop with an index would notice.
        self.keeps_places = not isinstance(container, nn.Sequential)
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
            if not isinstance(node, ast.Attribute):
                return is_own and _is_name(node, "self") and not isinstance(self.parents[node], ast.Attribute)
            of = self._resolve(node.value)
            if of is self.container:
                return node.attr in self.names or node.attr in _CHILDREN
            return of is None and not is_own and node.attr in self.names
        if isinstance(node, ast.Call) and _is_name(node.func, "getattr"):
            return any(isinstance(a, ast.Constant) and a.value == self.attribute for a in node.args)
        is_attribute = isinstance(node, ast.Attribute) and node.attr == self.attribute
        return is_attribute and any(self._resolve(node) is it for it in (None, self.container))

    def _resolve(self, node: ast.AST) -> object:
        """The module or list that `self.a.b` is, None where that does not show."""
        if _is_name(node, "self"):
            return self.holder
        of = self._resolve(node.value) if isinstance(node, ast.Attribute) else None
        if not (isinstance(node, ast.Attribute) and isinstance(of, nn.Module)):
            return None
        return of._modules.get(node.attr, vars(of).get(node.attr))

    def _is_container(self, node: ast.AST) -> bool:
        if self.attribute is None:
            return _is_name(node, "self")
        return isinstance(node, ast.Attribute) and node.attr == self.attribute and self._mentions(node)

    def _judge(self, method: str, node: ast.AST) -> None:
        parent = self.parents[node]
        is_none = isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if is_none or (isinstance(parent, ast.Call) and _is_name(parent.func, "len")):
            return
        certain = self._resolve(node) is self.container
        whole = self.attribute is not None and isinstance(parent, ast.Call) and parent.func is node
        place, in_order = (parent, True) if whole else self._place(node)
        if in_order:
            self.applied = self.applied or certain
            return
        said = f"{method}: `{' '.join(ast.unparse(place).split())[:120]}`"
        if certain and in_order is False:
            self.otherwise = self.otherwise or said
        else:
            self.doubt = self.doubt or said

    def _place(self, node: ast.AST) -> tuple[ast.AST, bool | None]:
        """The statement or expression around a mention, and whether it applies the elements in order."""
        parent = self.parents[node]
        if isinstance(parent, ast.Subscript) and parent.value is node:
            call = self.parents[parent]
            if not (isinstance(call, ast.Call) and call.func is parent):
                return parent, None
            loop = self._around(call, lambda n: isinstance(n, ast.For) and _is_name(n.target))
            return call, self._is_range(loop, parent.slice) and self._is_chain(loop, call, [parent])
        if isinstance(parent, ast.Assign) and any(isinstance(t, (ast.Tuple, ast.List)) for t in parent.targets):
            return parent, False
        loop = self._around(node, lambda n: isinstance(n, (ast.For, *_COMPREHENSIONS)))
        targets = [clause.target for clause in _clauses(loop) if any(n is node for n in ast.walk(clause.iter))]
        bound = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        calls = [n for n in ast.walk(loop or node) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in bound]
        if loop is None or not calls:
            return parent, None
        uses = self._uses(loop)
        link = next((call for call in calls if call.func in uses), None)
        return loop, link is not None and self._is_chain(loop, link, uses)

    def _around(self, node: ast.AST | None, is_it: Callable[[ast.AST], bool]) -> ast.AST | None:
        """The innermost node around `node` of which is_it."""
        while node is not None and not is_it(node):
            node = self.parents.get(node)
        return node

    def _uses(self, loop: ast.AST) -> list[ast.AST]:
        """Where the method reads the current element that `loop` binds, and no inner or other loop binds anew."""
        name = self._element(loop)

        def binds(node: ast.AST) -> bool:
            return any(_is_name(n, name) for clause in _clauses(node) for n in ast.walk(clause.target))

        read = [n for n in self.parents if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        return [n for n in read if self._around(n, binds) in (loop, None)]

    def _is_range(self, loop: ast.AST | None, index: ast.AST) -> bool:
        """loop is `for <index> in range(<length of the container>)`."""
        if not (isinstance(loop, ast.For) and isinstance(index, ast.Name) and _is_name(loop.target, index.id)):
            return False
        over = loop.iter
        if not (isinstance(over, ast.Call) and _is_name(over.func, "range") and len(over.args) == 1):
            return False
        length = over.args[0]
        if isinstance(length, ast.Call) and _is_name(length.func, "len"):
            return self.keeps_places and any(map(self._is_container, length.args))
        return self._is_as_long(self._value(length))

    def _is_as_long(self, length: object) -> bool:
        return self.keeps_places and isinstance(self.container, Sized) and length == len(self.container)

    def _element(self, loop: ast.AST) -> str | None:
        """The name of the current element in `loop`, where it is a `for` over the whole container."""
        if not isinstance(loop, ast.For):
            return None
        name, over, target = None, loop.iter, loop.target
        if self._is_container(over):
            name = target
        elif isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and isinstance(target, ast.Tuple):
            place = next((i for i, argument in enumerate(over.args) if self._is_container(argument)), None)
            rows = [row for row in map(self._resolve, over.args) if isinstance(row, _ROWS)]
            if over.func.id == "enumerate" and len(over.args) == 1 and not over.keywords and place == 0:
                name = target.elts[1]
            elif over.func.id == "zip" and place is not None and len(rows) == len(over.args):
                name = target.elts[place] if all(self._is_as_long(len(row)) for row in rows) else None
        return name.id if isinstance(name, ast.Name) else None

    def _value(self, node: ast.AST) -> object:
        """The value of a constant or of an attribute of self."""
        if isinstance(node, ast.Attribute) and _is_name(node.value, "self"):
            return vars(self.holder).get(node.attr, inspect.getattr_static(type(self.holder), node.attr, None))
        return node.value if isinstance(node, ast.Constant) else None

    def _is_chain(self, loop: ast.AST | None, call: ast.Call, uses: list[ast.AST]) -> bool:
        """One statement of the loop applies the element, `x = element(x)`, and no other meets the element or x."""
        if not isinstance(loop, ast.For) or loop.orelse or any(isinstance(n, _LEAVES) for n in ast.walk(loop)):
            return False
        links = [i for i, s in enumerate(loop.body) if any(n is call for n in ast.walk(s))]
        if len(links) != 1 or len(uses) != 1:
            return False
        element = re.escape(ast.unparse(call.func))
        form = rf"(\w+) = (?:{element}\(\1\)|([\w.]+)\({element}\(\1\)(?:, inplace=[^()]+)?\))"
        link = re.fullmatch(form, ast.unparse(loop.body[links[0]]))
        if link is None or not (link[2] is None or self._is_relu(link[2])):
            return False
        breaks: set[int] = set()
        for place, statement in enumerate(loop.body):
            if place not in links and any(_is_name(n, link[1]) for n in ast.walk(statement)):
                k = self._guard(statement, loop)
                if k is None or place > links[0]:
                    return False
                breaks.add(k)
        self.breaks |= breaks
        return True

    def _is_relu(self, function: str) -> bool:
        own = self.holder._modules.get(function[5:]) if function.startswith("self.") else None
        return isinstance(own, (nn.ReLU, nn.ReLU6)) or function in _RELU

    def _guard(self, statement: ast.stmt, loop: ast.For) -> int | None:
        """k, where the statement is `if i == k: …` on the index i of a loop over enumerate."""
        if not (isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare) and self.keeps_places):
            return None
        test, index = statement.test, loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else None
        is_enumerate = isinstance(loop.iter, ast.Call) and _is_name(loop.iter.func, "enumerate")
        if statement.orelse or not is_enumerate or not isinstance(index, ast.Name) or not _is_name(test.left, index.id):
            return None
        k = self._value(test.comparators[0]) if len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq) else None
        return k if isinstance(k, int) else None


def _clauses(loop: ast.AST | None) -> list[ast.For] | list[ast.comprehension]:
    """What binds a loop's variables: the For itself, or the clauses of a comprehension; [] for another node."""
    return [loop] if isinstance(loop, ast.For) else getattr(loop, "generators", [])
