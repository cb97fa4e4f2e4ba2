"""Find the conv towers of any model and put an IFRHead in place of each.

A tower is a run of consecutive 3×3 convolutions that keep their input's shape (stride 1,
dilation 1, padding 1 of zeros, one group, as many channels out as in), with nothing but norms and
activations between.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ifr_fast import IFRHead

from .layers import Layer, a_kind, read_layer
from .loops import may_be_read, read_list_use, read_use

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Replacement:
    """One tower that an IFRHead took the place of.

    path: where the IFRHead is now (`model.get_submodule(path)`); the first, if the module holding it has several.
    layers: paths of the modules that were there. convolutions: how many 3×3 convolutions they held.
    parameters_before, parameters_after: scalars in those modules and in the IFRHead.
    """

    path: str
    channels: int
    convolutions: int
    layers: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        share = self.parameters_after / self.parameters_before
        return (
            f"{self.path}: {self.convolutions} convolutions of {self.channels} channels, "
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters ({share:.0%})"
        )


@dataclass(frozen=True)
class Skipped:
    """Something tower-like that was left as it was, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'}: left alone, {self.reason}"


class Report(list[Replacement]):
    """What was replaced, in the model's order; `skipped` lists what was considered and left alone."""

    def __init__(self, replaced: Sequence[Replacement], skipped: Sequence[Skipped]):
        super().__init__(replaced)
        self.skipped = list(skipped)

    def __str__(self) -> str:
        return "\n".join(map(str, [*self, *self.skipped]))


def replace_towers(model: nn.Module, where: Where | None = None, **ifr_kwargs) -> Report:
    """Replaces every conv tower of `model`, in place, by `IFRHead(channels, **ifr_kwargs)`.

    model: any nn.Module. Towers are looked for in nn.Sequential, nn.ModuleList and their subclasses, and in plain
      lists of a module's own children (BMask R-CNN), over flat layers, nested Sequentials, wrappers of one
      convolution (mmcv's ConvModule) and convolutions that apply their own norm and activation (detectron2's
      Conv2d). A convolution that changes the number of channels stays, with its norm and activation. Strided,
      dilated, grouped, deformable and other than 3×3 ones stay too, and end a tower, as dropout, pooling or resizing
      does.
    where: which towers. None: all of them that save parameters (three convolutions or more), those of a VGG-like
      backbone included. A glob or a list of globs ("*.cls_convs", "roi_heads"), matched against the new IFRHead's
      path and all its ancestors'; each must lead to a replacement. Or a callable (path, container) -> bool.
    ifr_kwargs: passed to IFRHead.

    Returns a list of Replacement whose attribute `skipped` is a list of Skipped. The IFRHead takes the name of the
    tower's first layer. In a Sequential the tower's other names go; elsewhere they hold nn.Identity, so that
    `len(convs)`, `convs[i]` and `zip(convs, others)` stay right. A plain list of the layers follows suit. All other
    names, hence checkpoint keys, stay. A tower whose container hangs at several places stays shared; one that shares
    parameters otherwise is left alone.

    The IFRHead gets its tower's device, dtype, memory format and train/eval mode. Its parameters are new and require
    gradients even where the tower's were frozen. Call this before the optimizer is built and before the model is
    wrapped or compiled.

    How a container is used is read from the source of its own class and of those around it: a call of the whole, or
    `for conv in self.convs: x = conv(x)` (also with enumerate, zip, range), in every place that mentions it. Any
    other use, a wrapper whose forward may do more than apply its children, and a run of two convolutions are left
    alone unless `where` is given: naming them is your word that they are a tower. What the source shows to be no
    chain, `self.convs[level](…)` or a tap inside the loop, is never replaced, nor are layers that a method reads
    from a second list. No other code is read: that none holds the layers is assumed.

    Raises ValueError, before anything is changed: where `model` is no nn.Module, `where` is of another type or leads
      to no replacement (the message says what was found), or IFRHead refuses a tower that `where` names.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    globs = _globs(where)
    towers, skipped = _find(model, where)
    heads: list[tuple[_Tower, IFRHead]] = []
    for tower in towers:
        try:
            heads.append((tower, _build_head(tower, ifr_kwargs)))
        except ValueError as error:
            channels = tower.convolutions[0].in_channels
            if where is not None:
                raise ValueError(f"IFRHead for {tower.path}, {channels} channels: {error}") from error
            skipped.append(Skipped(tower.path, f"{channels} channels: {error}"))
    paths = [_join(path, tower.names[0]) for tower, _ in heads for path in tower.paths]
    for glob in globs or [None]:
        if not any(glob is None or _matches(path, glob) for path in paths):
            raise ValueError(_nothing_replaced(model, where if glob is None else glob, skipped))
    beside = _beside_the_tree(model)
    return Report([_install(tower, head, beside) for tower, head in heads], skipped)


def _globs(where: Where | None) -> list[str]:
    if where is None or (callable(where) and not isinstance(where, str)):
        return []
    globs = [where] if isinstance(where, str) else where
    if isinstance(globs, Sequence) and globs and all(isinstance(glob, str) for glob in globs):
        return list(globs)
    raise ValueError(f"where: expected None, a glob, a list of globs or a callable (path, module), got {where!r}")


def _matches(path: str, glob: str) -> bool:
    """glob matches path or one of its ancestors."""
    names = path.split(".")
    return any(fnmatchcase(".".join(names[:n]), glob) for n in range(1, len(names) + 1))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@dataclass
class _Tower:
    """Consecutive children of one container, or of a module that holds them in a plain list, its `attribute`."""

    container: nn.Module
    attribute: str | None
    paths: list[str]  # of the container; several where one object hangs at several places
    names: list[str]
    convolutions: tuple[nn.Conv2d, ...]

    @property
    def path(self) -> str:
        return _join(self.paths[0], self.names[0])

    def modules(self) -> list[nn.Module]:
        return [m for name in self.names for m in self.container._modules[name].modules()]


def _find(model: nn.Module, where: Where | None) -> tuple[list[_Tower], list[Skipped]]:
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)  # paths of the modules that hold a tensor, by its id
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            owners[id(tensor)].append(path)
    done = {m for head in paths if isinstance(head, IFRHead) for m in head.modules()}
    beside = _beside_the_tree(model)
    rows = [(container, attribute) for container in paths for attribute in _rows(container)]
    towers, skipped = [], []
    for container, attribute in rows:
        if container in done:
            continue
        found, left = _read_row(model, container, attribute, paths[container], where)
        skipped += left
        for tower in found:
            done.update(tower.modules())
            reason = _unfit(tower, owners) or _read_elsewhere(model, tower, beside)
            if reason:
                skipped.append(Skipped(tower.path, reason))
            elif len(tower.convolutions) == 2 and where is None:
                skipped.append(Skipped(tower.path, "two convolutions, as many as an IFRHead has: name it with `where`"))
            elif other := next((other for other in towers if set(tower.modules()) & set(other.modules())), None):
                skipped.append(Skipped(tower.path, f"its layers are those of the tower at {other.path}, too"))
            else:
                towers.append(tower)
    return towers, skipped


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
) -> tuple[list[_Tower], list[Skipped]]:
    """The towers among the container's children that `where` selects, and what of the rest looked like one."""
    children = container._modules
    if attribute is not None:
        names = {child: name for name, child in container._modules.items()}
        children = {names[layer]: layer for layer in vars(container)[attribute]}
    globs = _globs(where)

    def selected(name: str) -> bool:
        if globs:
            return any(_matches(_join(path, name), glob) for path in paths for glob in globs)
        return where is None or any(where(path, container) for path in paths)

    chosen = [name for name in children if selected(name)]
    trusted = where is not None
    layers = {name: read_layer(child, trusted) for name, child in children.items()} if chosen else {}
    if sum(layer.is_convolution for layer in layers.values()) < 2:
        return [], []
    uses = [read_use(model, p) if attribute is None else read_list_use(model, p, attribute) for p in paths]
    use = min(uses, key=lambda use: (False, None, True).index(use.in_order))
    breaks = frozenset().union(*(use.breaks for use in uses))
    towers = [
        _Tower(container, attribute, paths, names, convolutions)
        for names, convolutions in _split(layers, use.in_order is True, breaks)
        if names[0] in chosen and len(convolutions) > 1
    ]
    if use.in_order is False or (use.in_order is None and not trusted):
        path = paths[0] if attribute is None else _join(paths[0], attribute)
        return [], [Skipped(path, use.reason)] if towers else []
    misfits = [name for name in chosen if layers[name].ends and layers[name].is_convolution]
    return towers, [Skipped(_join(paths[0], name), layers[name].ends) for name in misfits]


def _split(
    layers: dict[str, Layer], in_order: bool, breaks: frozenset[int]
) -> Iterator[tuple[list[str], tuple[nn.Conv2d, ...]]]:
    """Runs of layers of one width, with what lies between and after: their names and their convolutions."""
    run: list[str] = []
    width = 0

    def close() -> Iterator[tuple[list[str], tuple[nn.Conv2d, ...]]]:
        held = [layers[name].convolutions for name in run if layers[name].convolutions]
        if len(held) > 1:  # else the run is that of a container inside
            yield run.copy(), sum(held, ())
        run.clear()

    for position, (name, layer) in enumerate(layers.items()):
        # Unless applied in order, an element of several convolutions may well be one of several branches.
        ends = layer.ends or (not in_order and len(layer.convolutions) > 1)
        channels = layer.convolutions[0].in_channels if layer.convolutions else width
        if ends or position in breaks or channels != width:
            yield from close()
        if not ends and (run or layer.convolutions):
            run.append(name)
            width = channels
    yield from close()


def _unfit(tower: _Tower, owners: dict[int, list[str]]) -> str:
    """Why a run of fitting layers cannot be replaced after all, or ""."""
    weights = [conv.weight for conv in tower.convolutions]
    if len({(w.device, w.dtype) for w in weights}) > 1:
        return "its convolutions are on several devices or of several dtypes"
    inside = [_join(path, name) for path in tower.paths for name in tower.names]
    for module in tower.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{a_kind(module)} in it has hooks, which would be lost"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for path in owners[id(tensor)] if tensor is not None else ():
                if not any(path == own or path.startswith(f"{own}.") for own in inside):
                    return f"it shares parameters with {path}, outside the tower"
    return ""


def _beside_the_tree(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Path, module and attribute of every list, tuple and dict of modules that is no part of the module tree."""
    return [
        (path, module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, held in vars(module).items()
        if attribute != "_modules" and _modules_in(held)
    ]


def _modules_in(held: object) -> list[nn.Module]:
    elements = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
    return [element for element in elements if isinstance(element, nn.Module)]


def _read_elsewhere(model: nn.Module, tower: _Tower, beside: list[tuple[str, nn.Module, str]]) -> str:
    """Which list beside the module tree the tower's layers may be read from, too, or ""."""
    layers = set(tower.modules())
    for path, module, attribute in beside:
        inside = [set(held.modules()) for held in _modules_in(vars(module)[attribute])]
        holds_layers = any(tower.container not in held and held & layers for held in inside)
        is_own = (module, attribute) == (tower.container, tower.attribute)
        if holds_layers and not is_own and may_be_read(model, path, attribute):
            return f"its layers may be read from {_join(path, attribute)}, too"
    return ""


def _nothing_replaced(model: nn.Module, where: object, skipped: list[Skipped]) -> str:
    kind = type(model).__name__
    if where is None:
        said = f"model: found no conv tower (three or more shape-preserving 3×3 convolutions in a row) in {kind}"
    else:
        said = f"where: {where!r} leads to no conv tower of {kind}"
        named = [module for path, module in model.named_modules() if path == where]
        said += f" (it is {a_kind(named[0])})" if named else ""
    if skipped:
        shown = [str(left) for left in skipped[:8]] + ["…"] * (len(skipped) > 8)
        return "\n  ".join([f"{said}:", *shown])
    others = [] if where is None else [tower.path for tower in _find(model, None)[0]]
    return f"{said}; its towers are at {', '.join(others)}" if others else said


def _build_head(tower: _Tower, ifr_kwargs: dict) -> IFRHead:
    first = tower.convolutions[0]
    head = IFRHead(first.in_channels, **ifr_kwargs)
    head.to(device=first.weight.device, dtype=first.weight.dtype)
    if first.weight.is_contiguous(memory_format=torch.channels_last) and not first.weight.is_contiguous():
        head.to(memory_format=torch.channels_last)
    return head.train(first.training)


def _install(tower: _Tower, head: IFRHead, beside: list[tuple[str, nn.Module, str]]) -> Replacement:
    before = {p: p.numel() for m in tower.modules() for p in m.parameters()}
    report = Replacement(
        path=tower.path,
        channels=tower.convolutions[0].in_channels,
        convolutions=len(tower.convolutions),
        layers=tuple(_join(tower.paths[0], name) for name in tower.names),
        parameters_before=sum(before.values()),
        parameters_after=sum(p.numel() for p in head.parameters()),
    )
    old = [tower.container._modules[name] for name in tower.names]
    new = {id(old[0]): head}
    setattr(tower.container, tower.names[0], head)
    for name, layer in zip(tower.names[1:], old[1:], strict=True):
        if isinstance(tower.container, nn.Sequential):
            delattr(tower.container, name)
        else:
            setattr(tower.container, name, nn.Identity())
            new[id(layer)] = tower.container._modules[name]
    gone = {id(layer) for layer in old} - new.keys()
    for _, module, attribute in beside:
        held = vars(module)[attribute]
        if isinstance(held, list):
            held[:] = [new.get(id(element), element) for element in held if id(element) not in gone]
    return report
