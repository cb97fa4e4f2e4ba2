"""Where the methods of a module name one container: `self.convs`, and the local names that stand for it."""

import ast
import inspect
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from .sources import parents, stored, words

INDEX = ast.Name("<index>", ast.Load())  # what counts from 0
CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
_AROUND = {*CHILDREN, "get_submodule", "__dict__"}  # of a module, read without the names of its children


class Mentions:
    """Mentions of one container in one method of a module at a time.

    Args:
        container: an nn.Sequential, nn.ModuleList, plain list or single layer.
        attribute: its name in the modules that hold it. None: `self` in its own class, and its children's names.
        names: the children that count, where not all do.
        keys: the names that lead to it from the container `within`, where the attribute holds that.
        aliases: whether local names that hold it count, too, and nothing that may be another's.
    """

    def __init__(
        self,
        container: nn.Module | list[nn.Module],
        attribute: str | None,
        names: Collection[str] = (),
        keys: Sequence[str] = (),
        within: nn.Module | list[nn.Module] | None = None,
        aliases: bool = False,
    ) -> None:
        self.container, self.attribute, self.keys, self.aliases = container, attribute, keys, aliases
        self.within = container if within is None else within
        self.names = names or (container._modules if isinstance(container, nn.Module) else ())

    def enter(self, holder: nn.Module, method: ast.Module) -> Iterator[ast.AST]:
        """The mentions in a method of `holder`, which holds the container or is it."""
        self.holder, self.method = holder, method
        if self.attribute is not None:
            found = words(method)
            if not found & {*_AROUND, "getattr", "vars"} and not any(self.attribute in word for word in found):
                return
        self.parents = parents(method)
        self.local: list[set[str]] = [set() for _ in self.keys] + [set()]
        if self.aliases:
            self._find_aliases()
        yield from (node for node in ast.walk(method) if self._is_mention(node))

    def resolve(self, node: ast.AST) -> object:
        """The module, list or other value that `self.a.b` or a constant is, None where that does not show."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id == "self":
            return self.holder
        of = self.resolve(node.value) if isinstance(node, ast.Attribute) else None
        if not (isinstance(node, ast.Attribute) and isinstance(of, nn.Module)):
            return None
        found = of._modules.get(node.attr, vars(of).get(node.attr))
        return inspect.getattr_static(type(of), node.attr, None) if found is None else found

    def is_container(self, node: ast.AST) -> bool:
        if self.attribute is None:
            return isinstance(node, ast.Name) and node.id == "self"
        return self._is_at(node, len(self.keys))

    def is_certain(self, node: ast.AST) -> bool:
        """Whether a mention is this container's, and not perhaps that of another with its name."""
        of = node.value if isinstance(node, ast.Attribute) and node.attr in CHILDREN else node
        return self.aliases or self.resolve(of) is self.container

    def is_around(self, node: ast.AST) -> bool:
        """Whether node may lead to the container by more than its attribute: a string, all that a holder holds."""
        match node:
            case _ if self.aliases or self.attribute is None:
                return False
            case ast.Constant(value=str(path)):
                at = self.parents[node]
                is_key = isinstance(at, ast.Dict) or isinstance(getattr(at, "ctx", None), ast.Store)
                is_read = isinstance(at, ast.Call) and ast.unparse(at.func) in ("getattr", "hasattr")
                return self.attribute in path.split(".") and not (is_key or is_read)
            case ast.Call(func=ast.Name(id="getattr"), args=[of, name, *_]):
                is_used = isinstance(self.parents[node], (ast.Call, ast.Subscript, ast.Attribute))  # as a module is
                return is_used and not isinstance(name, ast.Constant) and self._holds(self.resolve(of))
            case ast.Call(func=ast.Name(id="vars"), args=[of]):
                return self._holds(self.resolve(of))
            case ast.Attribute(value=of, attr=attr) if attr in _AROUND:
                is_lists = attr in CHILDREN and isinstance(self.within, list)  # a module's list is none of its children
                return not is_lists and self._holds(self.resolve(of))
        return False

    def _holds(self, module: object) -> bool:
        """Whether module is not the container, and what holds it."""
        layer = self.within[0] if isinstance(self.within, list) else self.within
        return isinstance(module, nn.Module) and module is not layer and any(m is layer for m in module.modules())

    def _is_mention(self, node: ast.AST) -> bool:
        if self.attribute is not None:
            return isinstance(node, ast.expr) and (self.is_container(node) or self.is_around(node))
        is_own = self.holder is self.container
        if not isinstance(node, ast.Attribute):
            is_self = isinstance(node, ast.Name) and node.id == "self"
            return is_own and is_self and not isinstance(self.parents[node], ast.Attribute)
        of = self.resolve(node.value)
        if of is self.container:
            return node.attr in self.names or node.attr in CHILDREN
        return of is None and not is_own and node.attr in self.names

    def _is_at(self, node: ast.AST, depth: int) -> bool:
        """Whether node is the container that is `depth` keys below the attribute."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                return name in self.local[depth]
            case ast.Subscript(value=of, slice=index) if depth and not isinstance(index, ast.Slice):
                is_key = not isinstance(index, ast.Constant) or str(index.value) == self.keys[depth - 1]
                return is_key and self._is_at(of, depth - 1)
            case ast.Call(func=ast.Name(id="getattr"), args=args) if not depth and not self.aliases:
                return any(isinstance(arg, ast.Constant) and arg.value == self.attribute for arg in args)
            case ast.Attribute(attr=self.attribute) if not depth:
                found = self.resolve(node)
                return found is self.within or (found is None and not self.aliases)
        return False

    def _find_aliases(self) -> None:
        """Local names that nothing else is ever bound to."""
        bound = [name.id for name in stored(self.method)]
        for depth in range(len(self.local)):
            found = []
            for node in ast.walk(self.method):
                if isinstance(node, ast.Assign) and self._is_at(node.value, depth):
                    found += [target.id for target in node.targets if isinstance(target, ast.Name)]
                for target, over in (pair for clause in clauses(node) for pair in elements(clause.target, clause.iter)):
                    if depth and isinstance(target, ast.Name) and self._is_at(over, depth - 1):
                        found.append(target.id)
            self.local[depth] = {name for name in found if found.count(name) == bound.count(name)}


def clauses(loop: ast.AST | None) -> list[ast.For] | list[ast.comprehension]:
    """What binds a loop's variables: the For itself, or the clauses of a comprehension; [] for another node."""
    return [loop] if isinstance(loop, ast.For) else getattr(loop, "generators", [])


def elements(target: ast.AST | None, over: ast.AST) -> Iterator[tuple[ast.AST | None, ast.AST]]:
    """Each part of a loop's target, and whose elements it holds in turn; None stands for a part that does not show."""
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
    match over:
        case ast.Call(func=ast.Name(id="enumerate"), args=[inner, *start], keywords=keywords):
            first, second = parts if len(parts) == 2 else (None, None)
            yield first, ast.Constant(None) if start or keywords else INDEX
            yield from elements(second, inner)
        case ast.Call(func=ast.Name(id="zip"), args=rows):
            for i, row in enumerate(rows):
                yield from elements(parts[i] if i < len(parts) else None, row)
        case (
            ast.Call(func=ast.Name(id="list" | "tuple"), args=[inner])
            | ast.Call(func=ast.Attribute(value=inner, attr="values" | "children"))
            | ast.Attribute(value=inner, attr="_modules")
        ):
            yield from elements(target, inner)
        case ast.Call(func=ast.Attribute(value=inner, attr="items" | "named_children"), args=[]):
            yield from elements(parts[1] if len(parts) == 2 else None, inner)
        case _:
            yield target, over
