"""How a class applies the elements of a module list: read from the source of its methods.

`for conv in self.convs: x = conv(x)` applies the elements one after the other; a feature pyramid's
`[self.convs[i](x[i]) for i in …]` applies one to each level. Both hold the same nn.ModuleList, and only
their source tells them apart.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType

from torch import nn

_Test = Callable[[ast.AST], bool]


@dataclass(frozen=True)
class Walk:
    """What the source says of a list.

    in_order: True where every walk found passes one value through the elements in turn, False where some
    walk does otherwise, None where none was found (or there is no source to read).
    breaks: positions before which a walk does something to the value (SOLO resizes it there).
    evidence: the deciding lines, with the name of their method.
    """

    in_order: bool | None
    breaks: frozenset[int] = frozenset()
    evidence: str = ""


def read_walk(owner: nn.Module, attribute: str | None, length: int, depth: int = 0) -> Walk:
    """How the class of `owner` applies the `length` elements of `owner.<attribute>` (of itself for None).

    depth counts the subscripts between: 1 for the lists inside `self.convs = ModuleList([ModuleList([…])])`.
    """
    reader = _Reader(owner, attribute, length, depth)
    for function in _methods_that_run(type(owner)):
        tree = _parse(function)
        if tree is not None:
            reader.read(function.__qualname__, tree)
    return Walk(reader.in_order, frozenset(reader.breaks), reader.evidence)


def _methods_that_run(cls: type) -> Iterator[FunctionType]:
    """Methods of cls but torch's own; overridden ones only where the overriding method calls them."""
    overridden: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(base).items():
            if not isinstance(value, FunctionType) or name in overridden:
                continue
            yield value
            tree = _parse(value)
            if tree is None or not any(_is_super_call(node, name) for node in ast.walk(tree)):
                overridden.add(name)


@functools.lru_cache(maxsize=4096)
def _parse(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, made by exec, compiled without its source
        return None


def _is_super_call(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "super"
    )


def _names(node: ast.AST) -> set[str]:
    return {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}


def _any_name_of(targets: list[ast.expr]) -> _Test:
    bound = set().union(*map(_names, targets))
    return lambda node: isinstance(node, ast.Name) and node.id in bound


def _is_name(node: ast.AST | None, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and (name is None or node.id == name)


class _Reader:
    """Gathers what every method says of one list."""

    def __init__(self, owner: nn.Module, attribute: str | None, length: int, depth: int):
        self.owner, self.attribute, self.length, self.depth = owner, attribute, length, depth
        self.in_order: bool | None = None
        self.breaks: set[int] = set()
        self.evidence = ""

    def read(self, method: str, tree: ast.AST) -> None:
        settled: set[int] = set()  # ids of calls that a recognised loop accounts for
        for node in ast.walk(tree):
            if isinstance(node, ast.For) and (element := self._element_of(node)):
                calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and element(c.func)]
                if calls and self._is_chain(node, element, calls):
                    self._found(True, method, node)
                    settled.update(map(id, calls))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Return, ast.Assign)) and self._calls_the_whole(node.value):
                self._found(True, method, node)
            elif isinstance(node, ast.Call) and id(node) not in settled and self._is_element(node.func):
                self._found(False, method, node)
            elif isinstance(node, ast.For) and self._mentions_list(node.iter):
                element = self._element_of(node) or _any_name_of([node.target])
                self._look_for_calls(method, node, element, settled)
            elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                targets = [g.target for g in node.generators if self._mentions_list(g.iter)]
                self._look_for_calls(method, node, _any_name_of(targets), settled)

    def _look_for_calls(self, method: str, loop: ast.AST, element: _Test, settled: set[int]) -> None:
        for call in ast.walk(loop):
            if isinstance(call, ast.Call) and element(call.func) and id(call) not in settled:
                self._found(False, method, loop)

    def _found(self, in_order: bool, method: str, node: ast.AST) -> None:
        if self.in_order is not False:
            self.in_order = in_order
            self.evidence = f"{method}: `{' '.join(ast.unparse(node).split())[:120]}`"

    def _is_list(self, node: ast.AST) -> bool:
        """node is self.<attribute> under `depth` subscripts (or self)."""
        for _ in range(self.depth):
            if not isinstance(node, ast.Subscript) or isinstance(node.slice, ast.Slice):
                return False
            node = node.value
        if self.attribute is None:
            return _is_name(node, "self")
        return isinstance(node, ast.Attribute) and node.attr == self.attribute and _is_name(node.value, "self")

    def _mentions_list(self, node: ast.AST) -> bool:
        if self.attribute is not None:
            return any(map(self._is_list, ast.walk(node)))
        of_self = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and _is_name(n.value, "self")]
        children = [n for n in of_self if n.attr in ("children", "named_children", "_modules")]
        return bool(children) or sum(_is_name(n, "self") for n in ast.walk(node)) > len(of_self)

    def _is_element(self, node: ast.AST) -> bool:
        """node is self.<attribute>[…], or for attribute=None a child by its name."""
        if isinstance(node, ast.Subscript):
            return self._is_list(node.value)
        return (
            self.attribute is None
            and isinstance(node, ast.Attribute)
            and _is_name(node.value, "self")
            and node.attr in self.owner._modules
        )

    def _calls_the_whole(self, node: ast.AST | None) -> bool:
        """node is self.<attribute>(x), or for attribute=None super().forward(x)."""
        if not isinstance(node, ast.Call):
            return False
        return _is_super_call(node, "forward") if self.attribute is None else self._is_list(node.func)

    def _element_of(self, loop: ast.For) -> _Test | None:
        """What recognises the current element in `loop`, where `loop` goes over the whole list."""
        goes_over, target = loop.iter, loop.target
        if self._is_list(goes_over) and isinstance(target, ast.Name):
            return lambda node: _is_name(node, target.id)
        if not (isinstance(goes_over, ast.Call) and isinstance(goes_over.func, ast.Name)):
            return None
        kind, arguments = goes_over.func.id, goes_over.args
        if kind == "range" and len(arguments) == 1 and _is_name(target) and self._is_length(arguments[0]):
            return lambda node: (
                isinstance(node, ast.Subscript) and self._is_list(node.value) and _is_name(node.slice, target.id)
            )
        if not isinstance(target, ast.Tuple):
            return None
        if kind == "enumerate" and len(arguments) == 1 and self._is_list(arguments[0]):
            name = target.elts[1]
        elif kind == "zip" and len(places := [i for i, a in enumerate(arguments) if self._is_list(a)]) == 1:
            name = target.elts[places[0]]
        else:
            return None
        return (lambda node: _is_name(node, name.id)) if isinstance(name, ast.Name) else None

    def _is_length(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and _is_name(node.func, "len") and len(node.args) == 1:
            return self._is_list(node.args[0])
        return self._value(node) == self.length

    def _value(self, node: ast.AST) -> object:
        """The value of a constant or of an attribute of self."""
        if isinstance(node, ast.Attribute) and _is_name(node.value, "self"):
            return getattr(self.owner, node.attr, None)
        return node.value if isinstance(node, ast.Constant) else None

    def _is_chain(self, loop: ast.For, element: _Test, calls: list[ast.Call]) -> bool:
        """One statement of the loop applies the element, `x = element(x)`, and no other meets x."""
        links = [s for s in loop.body if isinstance(s, ast.Assign) and calls[0] in ast.walk(s)]
        leaves_early = any(isinstance(n, (ast.Break, ast.Continue, ast.Return)) for n in ast.walk(loop))
        if len(calls) != 1 or len(links) != 1 or loop.orelse or leaves_early:
            return False
        link, call = links[0], calls[0]
        target = link.targets[0]
        if len(link.targets) != 1 or not _is_name(target) or call.keywords:
            return False
        if len(call.args) != 1 or not _is_name(call.args[0], target.id):
            return False
        if link.value is not call and not self._is_relu_of(link.value, call):
            return False
        breaks: set[int] = set()
        for position, statement in enumerate(loop.body):
            if statement is link or target.id not in _names(statement):
                continue
            where = self._guard(statement, loop.target)
            if where is None or position > loop.body.index(link):
                return False
            breaks.add(where)
        self.breaks |= breaks
        return True

    def _guard(self, statement: ast.stmt, target: ast.AST) -> int | None:
        """k, where the statement is `if i == k: …` on the loop's index i."""
        index = target.elts[0] if isinstance(target, ast.Tuple) else target
        if not (isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare) and _is_name(index)):
            return None
        test = statement.test
        if statement.orelse or not _is_name(test.left, index.id) or len(test.ops) != 1:
            return None
        k = self._value(test.comparators[0]) if isinstance(test.ops[0], ast.Eq) else None
        return k if isinstance(k, int) else None

    def _is_relu_of(self, node: ast.AST, call: ast.Call) -> bool:
        """relu(call): harmless where nn.Identity takes a vacated place, a second ReLU changing nothing."""
        if not (isinstance(node, ast.Call) and node.args == [call] and isinstance(node.func, ast.Attribute)):
            return False
        if _is_name(node.func.value, "self"):
            return isinstance(getattr(self.owner, node.func.attr, None), (nn.ReLU, nn.ReLU6))
        return node.func.attr in ("relu", "relu_")
