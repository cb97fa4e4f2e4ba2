"""The source of the methods of a class, as syntax trees."""

import ast
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from types import FunctionType

from torch import nn

# Called by mmengine, torch and detectron2 to build the module, fill its parameters and set its mode, without an input.
_SETUP = {"__init__", "_load_from_state_dict", "from_config", "init_weights", "reset_parameters", "train"}


def own_functions(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """Names and functions of the methods and properties of cls and its bases, torch's own left out."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != "torch":
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    yield name, function


def forward_of(module: nn.Module) -> object:
    """The forward of module's class, None where a call of module may run something else."""
    kind = type(module)
    return kind.forward if "forward" not in vars(module) and kind.__call__ is nn.Module.__call__ else None


@functools.lru_cache(maxsize=4096)
def parse(function: FunctionType) -> ast.Module | None:
    """The syntax tree of a function's source, None where there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, made by exec, compiled without its source
        return None


@functools.lru_cache(maxsize=4096)
def parents(tree: ast.Module) -> dict[ast.AST, ast.AST]:
    """What each node of a tree stands in."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


@functools.lru_cache(maxsize=4096)
def words(tree: ast.Module) -> set[str]:
    """The attributes and strings that a tree has, and what reads attributes by strings."""
    found = (getattr(node, "attr", getattr(node, "value", None)) for node in ast.walk(tree))
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"getattr", "vars"}
    return called | {word for word in found if isinstance(word, str)}


def stored(node: ast.AST) -> list[ast.Name]:
    """The names that node binds."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def methods_that_run(cls: type) -> list[tuple[str, ast.Module | None]]:
    """Qualified names and syntax trees (None without source) of the methods that an input may reach.

    Left out are those that only the construction reaches: the methods in _SETUP, and what they alone mention.
    """
    methods = [(name, function, parse(function)) for name, function in own_functions(cls)]
    mentions: dict[str, set[str]] = defaultdict(set)  # of methods by methods; bases' under the same name
    for name, _, tree in methods:
        mentions[name] |= words(tree) if tree else set()

    def mentioned(by: set[str]) -> set[str]:
        return set[str]().union(*(mentions[name] for name in by))

    setup = _SETUP & mentions.keys()
    while more := mentions.keys() & mentioned(setup) - setup - {"forward"}:
        setup |= more
    while shared := setup & mentioned(mentions.keys() - setup) - _SETUP:
        setup -= shared
    return [(function.__qualname__, tree) for name, function, tree in methods if name not in setup]
