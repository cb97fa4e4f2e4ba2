"""The conv towers of a model (replace.py says what one is), and why what looks like one is left alone."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ifr_fast import IFRHead

from .layers import Layer, a_kind, read_layer, tensors
from .report import Skipped
from .uses import may_be_read, read_list_use, read_use

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass
class Tower:
    """Consecutive children of one container, or of a module that holds them in a plain list, its `attribute`."""

    container: nn.Module
    attribute: str | None
    paths: list[str]  # of the container; several where one object hangs at several places
    layers: dict[str, nn.Module]  # by their names in the container
    convolutions: tuple[nn.Conv2d, ...]
    by_place: bool  # whether the places of the layers after the first must stay

    @property
    def path(self) -> str:
        return self.all_paths()[0]

    def all_paths(self) -> list[str]:
        """Those of the first layer, hence of the IFRHead that replaces it."""
        return [join(path, next(iter(self.layers))) for path in self.paths]

    def names(self) -> list[str]:
        """What `where` may call it: those paths, and the list's attribute."""
        return [*self.all_paths(), *(join(path, self.attribute) for path in self.paths if self.attribute)]

    def modules(self) -> list[nn.Module]:
        return [module for layer in self.layers.values() for module in layer.modules()]

    def holders(self) -> set[nn.Module]:
        """Those of its modules that hold tensors. An activation without any may be part of several towers."""
        return {module for module in self.modules() if tensors(module)}


def find_towers(model: nn.Module, where: Where | None) -> tuple[list[Tower], list[Skipped]]:
    """The towers that `where` selects, in the model's order, and what looked like one and is left alone."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)  # of each module
    owners: dict[int, list[str]] = defaultdict(list)  # paths of the modules that hold a tensor, by its id
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
        for tensor in tensors(module):
            owners[id(tensor)].append(path)
    done = {m for head in paths if isinstance(head, IFRHead) for m in head.modules()}
    beside = beside_the_tree(model)
    towers: list[Tower] = []
    skipped: list[Skipped] = []
    for container, attribute in [(module, attribute) for module in paths for attribute in _rows(module)]:
        if container in done:
            continue
        found, left = _read_row(model, container, attribute, paths[container], where)
        skipped += left
        for tower in found:
            done |= set(tower.modules())
            reason = _unfit(tower, owners) or _read_elsewhere(model, tower, beside, where is not None)
            holders = tower.holders()
            other = next((other for other in towers if holders & other.holders()), None)
            if not reason and len(tower.convolutions) == 2 and where is None:
                reason = "two convolutions, as many as an IFRHead has: name it with `where`"
            elif not reason and other:
                reason = f"its layers are those of the tower at {other.path}, too"
            if reason:
                skipped.append(Skipped(tower.path, reason))
            else:
                towers.append(tower)
    return towers, skipped


def globs_of(where: Where | None) -> list[str]:
    """The globs that `where` consists of, [] for None and for a callable. ValueError for anything else."""
    if where is None or (callable(where) and not isinstance(where, str)):
        return []
    globs = [where] if isinstance(where, str) else where
    if isinstance(globs, Sequence) and globs and all(isinstance(glob, str) for glob in globs):
        return list(globs)
    raise ValueError(f"where: expected None, a glob, a list of globs or a callable (path, module), got {where!r}")


def matches(path: str, glob: str) -> bool:
    """Whether glob matches path or one of its ancestors. "" is the model itself, which holds all."""
    names = path.split(".")
    return not glob or any(fnmatchcase(".".join(names[:n]), glob) for n in range(1, len(names) + 1))


def _names(glob: str, path: str) -> bool:
    """Whether glob names the module at path itself, which "*" for whatever there is does not."""
    (above, _, last), (over, _, wanted) = path.rpartition("."), glob.rpartition(".")
    if glob == path:
        return True
    if wanted == "*":
        return bool(over) and _names(over, above)
    return fnmatchcase(last, wanted) and fnmatchcase(path, glob)


def join(path: str, name: str) -> str:
    """The path of the child `name` of the module at `path`."""
    return f"{path}.{name}" if path else name


def beside_the_tree(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Path, module and attribute of all that holds modules and is no part of the module tree, such as a list."""
    return [
        (path, module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, held in vars(module).items()
        if attribute != "_modules" and _modules_in(held)
    ]


def _modules_in(held: object) -> list[nn.Module]:
    if isinstance(held, nn.Module):
        return [held]
    elements = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple, set)) else ()
    return [module for element in elements for module in _modules_in(element)]


def _rows(module: nn.Module) -> list[str | None]:
    """Where module holds layers in a row: as a container (None), or in which plain lists of its own children."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [None]
    own = {id(child) for child in module.children()}
    return [
        attribute
        for attribute, held in vars(module).items()
        if isinstance(held, list) and len({id(layer) for layer in held} & own) == len(held) > 1
    ]


def _read_row(
    model: nn.Module, container: nn.Module, attribute: str | None, paths: list[str], where: Where | None
) -> tuple[list[Tower], list[Skipped]]:
    """The towers among the container's children that `where` selects, and what of the rest looked like one."""
    children = container._modules
    if attribute is not None:
        names = {child: name for name, child in container._modules.items()}
        children = {names[layer]: layer for layer in vars(container)[attribute]}
    globs = globs_of(where)

    def places(name: str) -> list[str]:
        return [join(path, part) for path in paths for part in (name, attribute) if part]

    def selected(name: str) -> bool:
        if globs:
            return any(matches(path, glob) for path in places(name) for glob in globs)
        return not callable(where) or any(where(path, container) for path in paths)

    chosen = [name for name in children if selected(name)]
    named = {*paths, *(path for name in chosen for path in places(name))}
    trusted = callable(where) or any(_names(glob, path) for path in named for glob in globs)
    layers = {name: read_layer(child, trusted) for name, child in children.items()} if chosen else {}
    if sum(layer.is_convolution for layer in layers.values()) < 2:
        return [], []
    uses = [read_use(model, p) if attribute is None else read_list_use(model, p, attribute) for p in paths]
    use = min(uses, key=lambda use: (False, None, True).index(use.in_order))
    breaks = frozenset[int]().union(*(use.breaks for use in uses))
    by_place = any(use.by_place for use in uses) or not isinstance(container, nn.Sequential)
    towers = []
    for run in _split(layers, use.in_order is True, breaks):
        held = [layers[name].convolutions for name in run if layers[name].convolutions]
        if len(held) > 1 and run[0] in chosen:  # one element that holds them all is a container, read by itself
            own = {name: child for name in run if (child := children[name]) is not None}
            towers.append(Tower(container, attribute, paths, own, sum(held, ()), by_place))
    if use.in_order is False or (use.in_order is None and not trusted):
        path = paths[0] if attribute is None else join(paths[0], attribute)
        return [], [Skipped(path, use.reason)] if towers else []
    misfits = [name for name in chosen if layers[name].ends and layers[name].is_convolution]
    return towers, [Skipped(join(paths[0], name), layers[name].ends) for name in misfits]


def _split(layers: dict[str, Layer], in_order: bool, breaks: frozenset[int]) -> Iterator[list[str]]:
    """The names of each run of layers of one width, with what lies between and after."""
    run: list[str] = []
    width = 0
    for position, (name, layer) in enumerate(layers.items()):
        # Unless applied in order, an element of several convolutions may well be one of several branches.
        ends = layer.ends or (not in_order and len(layer.convolutions) > 1)
        channels = layer.convolutions[0].in_channels if layer.convolutions else width
        if ends or position in breaks or channels != width:
            yield run
            run = []
        if not ends and (run or layer.convolutions):
            run.append(name)
            width = channels
    yield run


def _unfit(tower: Tower, owners: dict[int, list[str]]) -> str:
    """Why a run of fitting layers cannot be replaced after all, or ""."""
    weights = [conv.weight for conv in tower.convolutions]
    if len({(w.device, w.dtype) for w in weights}) > 1:
        return "its convolutions are on several devices or of several dtypes"
    inside = [join(path, name) for path in tower.paths for name in tower.layers]
    for module in tower.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{a_kind(module)} in it has hooks, which would be lost"
        for tensor in tensors(module):
            for path in owners[id(tensor)]:
                if not any(path == own or path.startswith(f"{own}.") for own in inside):
                    return f"it shares parameters with {path}, outside the tower"
    return ""


def _read_elsewhere(model: nn.Module, tower: Tower, beside: list[tuple[str, nn.Module, str]], trusted: bool) -> str:
    """What beside the module tree the tower's layers may be read from, too, or ""; trusted: not by their container."""
    layers = tower.holders()
    for path, module, attribute in beside:
        inside = [set(held.modules()) for held in _modules_in(vars(module)[attribute])]
        holds_layers = any(not (trusted and tower.container in held) and held & layers for held in inside)
        is_own = (module, attribute) == (tower.container, tower.attribute)
        if holds_layers and not is_own and may_be_read(model, path, attribute):
            return f"its layers may be read from {join(path, attribute)}, too: leave one of both"
    return ""
