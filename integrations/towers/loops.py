"""What a loop does with the elements of a container: followed through the names of its body, each in place of what it
holds, until `x` is seen to be `relu(element(x))`, or to be something else."""

import ast
import copy
from collections.abc import Sized
from dataclasses import dataclass

from torch import nn

from .mentions import INDEX, Mentions, clauses, elements
from .sources import stored

_ROWS = (nn.Sequential, nn.ModuleList, list)
_LEAVES = (ast.Break, ast.Continue, ast.Return)
_RELU_NAMES = {"F.relu", "F.relu_", "torch.relu", "torch.relu_"}
_MOST_NODES = 400  # of one name's value
_ELEMENT, _RELU, _OTHER = (ast.Name(f"<{name}>", ast.Load()) for name in ("element", "relu", "other"))
NOT_IN_TURN = "its elements are not applied one after the other: "
ONE_BY_ONE = "its elements are called one by one, not in one loop: "
NOT_ALONE = "the loop does not just apply one element after the other, with a ReLU: "


@dataclass(frozen=True)
class Verdict:
    """in_order: as Use's. breaks: positions before which something else is done. why: what is certainly otherwise."""

    in_order: bool | None
    why: str = ""
    breaks: frozenset[int] = frozenset()


class Loop:
    """One loop over the elements of a container: a For, While or comprehension; or a whole method, for single ones."""

    def __init__(self, node: ast.AST, mentions: Mentions) -> None:
        self.node, self.mentions = node, mentions
        self.whole: bool | None = None  # whether the loop meets every element in turn
        self.effects: list[ast.AST] = []
        self.tests: list[ast.AST] = []
        self.leaves = False
        self.breaks: set[int] = set()
        env: dict[str, ast.AST] = {}
        for clause in clauses(node):
            self._bind(clause, env)
        if isinstance(node, (ast.For, ast.While, ast.FunctionDef)):
            self._run(node.body, env)
        else:
            self.effects += [self._inline(child, env) for child in ast.iter_child_nodes(node)]
        self.env = env

    def judge(self) -> Verdict:
        chains = [name for name, value in self.env.items() if any(_reads(call, name) for call in _calls(value))]
        everything = [*self.env.values(), *self.effects, *self.tests]
        single = isinstance(self.node, ast.FunctionDef)
        if not chains or single:
            why = ONE_BY_ONE if single else NOT_IN_TURN
            return Verdict(False, why) if any(map(_calls, everything)) else Verdict(None)
        # Of two chains one may have a ReLU behind its elements, and the other none.
        link = self._is_link(self.env[chains[0]], chains[0]) if len(chains) == 1 else False
        if link is False:
            return Verdict(False, NOT_ALONE)
        inner = {name for name, value in self.env.items() if name not in chains and _reads(value, "<element>", *chains)}
        if any(_calls(e) or _reads(e, *chains) for e in self.effects) or any(_reads(e, *inner) for e in everything):
            return Verdict(False, NOT_IN_TURN)
        if any(self._is_read_behind(name) for name in inner):
            return Verdict(False, NOT_IN_TURN)
        if self.whole is False or (self.leaves and isinstance(self.node, ast.For)):
            return Verdict(False, NOT_ALONE)
        unknown = link is None or self.whole is None or self.leaves
        unknown = unknown or any(_reads(e, "<element>", *chains) for e in (*self.effects, *self.tests))
        return Verdict(None if unknown else True, breaks=frozenset(self.breaks))

    def counts(self) -> bool:
        """Whether something else is done or carried on in each turn, so that their number counts."""
        return bool(self.effects) or any(_reads(v, name) for name, v in self.env.items() if not _calls(v))

    def _bind(self, clause: ast.For | ast.comprehension, env: dict[str, ast.AST]) -> None:
        env |= {n.id: _OTHER for n in stored(clause.target)}
        lengths = []
        for target, over in elements(clause.target, clause.iter):
            lengths += [self._length(over)] * (over is not INDEX)
            if isinstance(target, ast.Name):
                env[target.id] = self._element_of(over)
        sized = len(self.mentions.container) if isinstance(self.mentions.container, Sized) else None
        is_strict = "strict=True" in ast.unparse(clause.iter) and sized in lengths
        if sized is not None and (None not in lengths or is_strict):
            self.whole = all(length in (sized, None) for length in lengths)

    def _element_of(self, over: ast.AST) -> ast.AST:
        if self.mentions.is_container(over):
            return _ELEMENT
        if over is INDEX or (isinstance(over, ast.Call) and ast.unparse(over.func) == "range"):
            return INDEX
        row = self.mentions.resolve(over)
        return _RELU if isinstance(row, _ROWS) and row and all(map(_is_relu, row)) else _OTHER

    def _length(self, over: ast.AST) -> int | None:
        """How many elements there are to walk, None where that does not show."""
        match over:
            case ast.Call(func=ast.Name(id="len" | "range"), args=[inner]):
                return self._length(inner)
            case ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=0), stop, *step]):
                return self._length(stop) if [ast.unparse(n) for n in step] in ([], ["1"]) else None
        value = self.mentions.container if self.mentions.is_container(over) else self.mentions.resolve(over)
        return value if isinstance(value, int) else len(value) if isinstance(value, (*_ROWS, tuple)) else None

    def _inline(self, node: ast.AST, env: dict[str, ast.AST]) -> ast.AST:
        """node, with names replaced by what they hold and elements, indices and ReLUs by their marks."""
        if isinstance(node, ast.Name):
            return env.get(node.id, node)
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice):
            index = self._inline(node.slice, env)
            if self.mentions.is_container(node.value):
                self.whole = self.whole if index is INDEX else None
                return _ELEMENT
            if index is INDEX and self._element_of(node.value) is _RELU:
                return _RELU
        if isinstance(node, ast.Attribute) and _is_relu(self.mentions.resolve(node) or ast.unparse(node)):
            return _RELU
        new = copy.copy(node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(new, field, [self._inline(v, env) if isinstance(v, ast.AST) else v for v in value])
            elif isinstance(value, ast.AST):
                setattr(new, field, self._inline(value, env))
        if sum(1 for _ in ast.walk(new)) <= _MOST_NODES:
            return new
        leaves = {n.id: n for n in ast.walk(new) if isinstance(n, ast.Name)}
        return ast.Tuple([*leaves.values(), *_calls(new)[:1]], ast.Load())

    def _run(self, body: list[ast.stmt], env: dict[str, ast.AST]) -> None:
        for statement in body:
            match statement:
                case ast.Assign() | ast.AnnAssign(value=ast.AST()):
                    value = self._inline(statement.value, env)
                    for target in getattr(statement, "targets", None) or [statement.target]:
                        self._assign(target, value, env)
                case ast.AugAssign(target=target, op=op, value=value):
                    if isinstance(target, ast.Name):  # other names of the tensor see the change too
                        self.effects.append(self._inline(target, env))
                    self._assign(target, self._inline(ast.BinOp(target, op, value), env), env)
                case ast.If(test=test):
                    test = self._inline(test, env)
                    branches = [dict(env), dict(env)]
                    self._run(statement.body, branches[0])
                    self._run(statement.orelse, branches[1])
                    self.tests.append(test)
                    for name in branches[0] | branches[1]:
                        a, b = (branch.get(name, ast.Name(name, ast.Load())) for branch in branches)
                        env[name] = a if ast.dump(a) == ast.dump(b) else ast.IfExp(test, a, b)
                case ast.With() | ast.For() | ast.While() | ast.Try():
                    inside = env if isinstance(statement, ast.With) else dict(env)
                    parts = list(ast.iter_child_nodes(statement))
                    self.effects += [self._inline(n, env) for n in parts if isinstance(n, (ast.expr, ast.withitem))]
                    inside |= {n.id: _OTHER for clause in clauses(statement) for n in stored(clause.target)}
                    leaves = self.leaves
                    for part in parts:
                        self._run([part] if isinstance(part, ast.stmt) else getattr(part, "body", []), inside)
                    self.leaves = leaves or any(isinstance(n, ast.Return) for n in ast.walk(statement))
                    changed = [name for name, value in inside.items() if env.get(name) is not value]
                    env |= {name: ast.Starred(inside[name], ast.Load()) for name in changed}
                case ast.Expr(value=value):
                    value = self._inline(value, env)
                    is_in_place = isinstance(value, ast.Call) and value.func is _RELU and _calls(value)  # or nothing
                    if not is_in_place:
                        self.effects.append(value)
                case ast.Assert(test=test):
                    self.tests.append(self._inline(test, env))
                case _:
                    self.leaves = self.leaves or isinstance(statement, _LEAVES)
                    self.effects.append(self._inline(statement, env))

    def _assign(self, target: ast.AST, value: ast.AST, env: dict[str, ast.AST]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple):
            pairs = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._assign(part, value.elts[i] if pairs else ast.Starred(value, ast.Load()), env)
        else:  # a part of x is changed where x stands in the target
            self.effects += [value, self._inline(target, env)]

    def _is_link(self, value: ast.AST, name: str) -> bool | None:
        """Whether value is an element applied to what `name` held before, with ReLUs around it."""
        match value:
            case ast.Call(func=func, args=[inner, *more]) if func is _RELU:
                return False if any(map(_calls, more)) else self._is_link(inner, name)
            case ast.Call(func=ast.Attribute(value=inner, attr="relu" | "relu_"), args=[]):
                return self._is_link(inner, name)
            case ast.Call(func=func, args=[inner], keywords=[]) if func is _ELEMENT:
                return self._is_start(inner, name)
            case ast.IfExp():
                both = [self._is_link(part, name) for part in (value.body, value.orelse)]
                return False if False in both else None if None in both or _reads(value.test, "<index>") else True
        is_passed_on = isinstance(value, ast.Call) and any(arg is _ELEMENT for arg in value.args)
        return None if is_passed_on and not _calls(value) else False

    def _is_start(self, value: ast.AST, name: str) -> bool:
        """Whether an element gets what `name` held before; other things that are done to it at one place are breaks."""
        match value:
            case ast.Name(id=found):
                return found == name
            case ast.IfExp(test=ast.Compare(left=index, ops=[ast.Eq()], comparators=[at])) if index is INDEX:
                place = self.mentions.resolve(at)
                if isinstance(place, int) and not _calls(value):
                    self.breaks.add(place)
                    return self._is_start(value.orelse, name)
        return False

    def _is_read_behind(self, name: str) -> bool:
        """Whether the method reads, behind the loop, what the loop left in a name."""
        last = self.node.body[-1] if isinstance(self.node, (ast.For, ast.While)) else self.node  # an else is behind it
        end = last.end_lineno, last.end_col_offset
        names = [n for n in ast.walk(self.mentions.method) if isinstance(n, ast.Name) and n.id == name]
        behind = [n for n in names if (n.lineno, n.col_offset) >= end]
        stores = [n.lineno for n in behind if isinstance(n.ctx, ast.Store)]
        return any(isinstance(n.ctx, ast.Load) and n.lineno < min(stores, default=n.lineno + 1) for n in behind)


def _is_relu(function: object) -> bool:
    """Whether it is an nn.ReLU or the code of torch's function."""
    return type(function) in (nn.ReLU, nn.ReLU6) or (isinstance(function, str) and function in _RELU_NAMES)


def _calls(node: ast.AST) -> list[ast.Call]:
    """The calls of an element in node."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and n.func is _ELEMENT]


def _reads(node: ast.AST, *names: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))
