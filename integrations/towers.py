"""Find the conv towers of any model and put an IFRHead in place of each.

A tower is a run of two or more consecutive 3×3 convolutions that keep their input's shape (stride 1,
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
from .walks import Walk, read_walk

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Replacement:
    """One tower that an IFRHead took the place of.

    path: where the IFRHead is now (`model.get_submodule(path)`); also_at: its other paths, if shared.
    layers: paths of the modules that were there. convolutions: how many 3×3 convolutions they held.
    parameters_before, parameters_after: scalars in those modules and in the IFRHead.
    """

    path: str
    channels: int
    convolutions: int
    layers: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    also_at: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.parameters_after / self.parameters_before
        return (
            f"{', '.join((self.path, *self.also_at))}: {self.convolutions} convolutions of {self.channels} "
            f"channels, {self.parameters_before:,} → {self.parameters_after:,} parameters ({share:.0%})"
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

    model: any nn.Module. Towers are looked for in nn.Sequential, nn.ModuleList and their subclasses, over
      flat layers, nested Sequentials, wrappers of one convolution (mmcv's ConvModule) and convolutions that
      apply their own norm and activation (detectron2's Conv2d). A convolution that changes the number of
      channels stays, with its norm and activation, and two or more must follow it. Strided, dilated,
      grouped, deformable and other than 3×3 ones stay too, and end a tower, as dropout, pooling or
      resizing does.
    where: which towers. None: all of them, those of a VGG-like backbone included. A glob or a list of
      globs ("*.cls_convs", "roi_heads"), matched against the new IFRHead's path and all its ancestors';
      each must lead to a replacement. Or a callable (path, container) -> bool.
    ifr_kwargs: passed to IFRHead.

    Returns a list of Replacement whose attribute `skipped` is a list of Skipped. The IFRHead takes the name
    of the tower's first layer. In a Sequential the tower's other names go; in a ModuleList they hold
    nn.Identity, so that `len(convs)`, `convs[i]` and `zip(convs, others)` stay right. All other names, hence
    checkpoint keys, stay. A tower reached by several paths is replaced once and stays shared; one that shares
    only some of its parameters with the rest of the model is left alone.

    The IFRHead gets its tower's device, dtype, memory format and train/eval mode. Its parameters are new and
    require gradients even where the tower's were frozen. Call this before the optimizer is built and before
    the model is wrapped or compiled.

    How a ModuleList is used is read from the source of its owner's class: `for conv in self.convs: x =
    conv(x)` (also with enumerate, zip, range) is a tower; `self.convs[level](…)` is not, and is never
    replaced. Where the source is missing or shows neither, the list is left alone unless `where` is given:
    naming it is your word that its elements are applied one after the other. What cannot be seen is assumed:
    that a wrapper does nothing beyond its convolution, norm and activation (only its output's shape is
    tried), and that no code holds the layers outside the module tree.

    Raises ValueError, before anything is changed: where `model` is no nn.Module, `where` is of another type
      or leads to no replacement (the message says what was found), or IFRHead refuses a tower's channels.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    globs = _globs(where)
    towers, skipped = _find(model, where)
    paths = [path for tower in towers for path in _head_paths(tower)]
    for glob in globs or [None]:
        if not any(glob is None or _matches(path, glob) for path in paths):
            raise ValueError(_nothing_replaced(model, where if glob is None else glob, skipped))
    heads = [_build_head(tower, ifr_kwargs) for tower in towers]
    return Report([_install(tower, head) for tower, head in zip(towers, heads, strict=True)], skipped)


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
class _Run:
    """Consecutive children of one container that make a tower there."""

    container: nn.Module
    paths: list[str]  # of the container
    names: list[str]
    convolutions: tuple[nn.Conv2d, ...]

    def layer_paths(self) -> list[str]:
        return [_join(path, name) for path in self.paths for name in self.names]

    def modules(self) -> list[nn.Module]:
        return [m for name in self.names for m in self.container._modules[name].modules()]

    def key(self) -> tuple[nn.Module, ...]:
        """What two runs have in common that are one tower: every module with parameters or buffers."""
        return tuple(m for m in self.modules() if m._parameters or m._buffers)


_Tower = list[_Run]  # one run, or one in each of several containers that hold the same modules


def _head_paths(tower: _Tower) -> list[str]:
    return [_join(path, run.names[0]) for run in tower for path in run.paths]


def _find(model: nn.Module, where: Where | None) -> tuple[list[_Tower], list[Skipped]]:
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)  # paths of the modules that hold a tensor, by its id
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            owners[id(tensor)].append(path)
    done = {m for head in paths if isinstance(head, IFRHead) for m in head.modules()}
    found = {
        module: _read_container(model, module, paths[module], where)
        for module in paths
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and module not in done
    }
    same: dict[tuple[nn.Module, ...], _Tower] = defaultdict(list)
    for runs, _ in found.values():
        for run in runs:
            same[run.key()].append(run)

    towers, skipped = [], []
    for container, (runs, left) in found.items():
        if container in done:  # inside a tower that an outer container holds
            continue
        skipped += left
        for run in runs:
            tower = same.pop(run.key(), [])
            reason = _unfit(tower, owners) if tower else ""
            if reason:
                skipped.append(Skipped(_head_paths(tower)[0], reason))
            elif tower:
                towers.append(tower)
                done.update(m for r in tower for m in r.modules())
    return towers, skipped


def _read_container(
    model: nn.Module, container: nn.Module, paths: list[str], where: Where | None
) -> tuple[list[_Run], list[Skipped]]:
    """The runs among the container's children that `where` selects, and what of the rest looked like one."""
    globs = _globs(where)

    def selected(name: str) -> bool:
        if globs:
            return any(_matches(_join(path, name), glob) for path in paths for glob in globs)
        return where is None or any(where(path, container) for path in paths)

    chosen = [name for name in container._modules if selected(name)]
    layers = {name: read_layer(child) for name, child in container._modules.items()} if chosen else {}
    if sum(layer.is_convolution for layer in layers.values()) < 2:
        return [], []
    walk = _walk(model, container, paths)
    runs = [_Run(container, paths, names, convs) for names, convs in _split(layers, walk) if names[0] in chosen]
    towers = [run for run in runs if len(run.convolutions) > 1]
    if walk.in_order is False:
        reason = f"its elements are not applied one after the other: {walk.evidence}"
        return [], [Skipped(paths[0], reason)] if towers else []
    if walk.in_order is None and where is None:
        reason = "no source shows how its elements are applied: name it with `where`"
        return [], [Skipped(paths[0], reason)] if towers else []
    misfits = [name for name in chosen if layers[name].ends and layers[name].is_convolution]
    single = [run.names for run in runs if len(run.convolutions) == 1]
    return towers, [
        *(Skipped(_join(paths[0], name), layers[name].ends) for name in misfits),
        *(Skipped(_join(paths[0], names[0]), _alone(layers, names)) for names in single),
    ]


def _split(layers: dict[str, Layer], walk: Walk) -> Iterator[tuple[list[str], tuple[nn.Conv2d, ...]]]:
    """Runs of layers of one width, with what lies between and after: their names and their convolutions."""
    run: list[str] = []
    width = 0

    def close() -> Iterator[tuple[list[str], tuple[nn.Conv2d, ...]]]:
        held = [layers[name].convolutions for name in run if layers[name].convolutions]
        if held and (len(held) > 1 or len(held[0]) == 1):  # else the run is that of a container inside
            yield run.copy(), sum(held, ())
        run.clear()

    for position, (name, layer) in enumerate(layers.items()):
        # Unless applied in order, an element of several convolutions may well be one of several branches.
        ends = layer.ends or (not walk.in_order and len(layer.convolutions) > 1)
        channels = layer.convolutions[0].in_channels if layer.convolutions else width
        if ends or position in walk.breaks or channels != width:
            yield from close()
        if not ends and (run or layer.convolutions):
            run.append(name)
            width = channels
    yield from close()


def _alone(layers: dict[str, Layer], names: list[str]) -> str:
    order = list(layers)
    start, stop = order.index(names[0]), order.index(names[-1]) + 1
    before = [name for name in order[:start] if layers[name].ends or layers[name].convolutions]
    beside = [name for name in before[-1:] + order[stop : stop + 1] if layers[name].ends]
    said = ", ".join(f"{name} is {layers[name].ends}" for name in beside)
    return f"a single 3×3 convolution{said and ': '}{said}"


def _walk(model: nn.Module, container: nn.Module, paths: list[str]) -> Walk:
    """How the container's children are applied, by its own forward or by its owner's methods."""
    owners = [_owner(model, path) for path in paths]
    walks = [read_walk(*owner[:2], len(container), owner[2]) for owner in owners if owner]
    if type(container).forward in (nn.Sequential.forward, nn.ModuleList.forward):
        in_order = isinstance(container, nn.Sequential) or any(walk.in_order for walk in walks) or None
    else:
        walks.append(read_walk(container, None, len(container)))
        in_order = walks[-1].in_order
    if "forward" in vars(container):  # replaced on this one object
        in_order = None
    refused = [walk for walk in walks if walk.in_order is False]
    if refused:
        return refused[0]
    return Walk(in_order, frozenset().union(*(walk.breaks for walk in walks)))


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str | None, int] | None:
    """Whose methods apply the container at path: the module, its attribute, and how many subscripts on."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        above = names[: len(names) - 1 - depth]
        owner = model.get_submodule(".".join(above))
        if not isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
            return owner, names[len(above)], depth
        if type(owner).forward is not nn.Module.forward:
            return owner, None, depth + 1
    return None


def _unfit(tower: _Tower, owners: dict[int, list[str]]) -> str:
    """Why a run of fitting layers cannot be replaced after all, or ""."""
    weights = [conv.weight for conv in tower[0].convolutions]
    if len({(w.device, w.dtype) for w in weights}) > 1:
        return "its convolutions are on several devices or of several dtypes"
    inside = tuple(path for run in tower for path in run.layer_paths())
    for module in (m for run in tower for m in run.modules()):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{a_kind(module)} in it has hooks, which would be lost"
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for path in owners[id(tensor)] if tensor is not None else ():
                if not any(path == own or path.startswith(f"{own}.") for own in inside):
                    return f"it shares parameters with {path}, outside the tower"
    return ""


def _nothing_replaced(model: nn.Module, where: object, skipped: list[Skipped]) -> str:
    kind = type(model).__name__
    if where is None:
        said = f"model: found no conv tower (two or more shape-preserving 3×3 convolutions in a row) in {kind}"
    else:
        said = f"where: {where!r} leads to no conv tower of {kind}"
        named = [module for path, module in model.named_modules() if path == where]
        said += f" (it is {a_kind(named[0])})" if named else ""
    if skipped:
        shown = [str(left) for left in skipped[:8]] + ["…"] * (len(skipped) > 8)
        return "\n  ".join([f"{said}:", *shown])
    others = [] if where is None else [_head_paths(tower)[0] for tower in _find(model, None)[0]]
    return f"{said}; its towers are at {', '.join(others)}" if others else said


def _build_head(tower: _Tower, ifr_kwargs: dict) -> IFRHead:
    first = tower[0].convolutions[0]
    weight = first.weight
    try:
        head = IFRHead(first.in_channels, **ifr_kwargs)
    except ValueError as error:
        raise ValueError(f"IFRHead for {_head_paths(tower)[0]}, {first.in_channels} channels: {error}") from error
    head.to(device=weight.device, dtype=weight.dtype)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        head.to(memory_format=torch.channels_last)
    return head.train(first.training)


def _install(tower: _Tower, head: IFRHead) -> Replacement:
    before = {p: p.numel() for run in tower for m in run.modules() for p in m.parameters()}
    path, *also_at = _head_paths(tower)
    run = tower[0]
    report = Replacement(
        path=path,
        channels=run.convolutions[0].in_channels,
        convolutions=len(run.convolutions),
        layers=tuple(_join(run.paths[0], name) for name in run.names),
        parameters_before=sum(before.values()),
        parameters_after=sum(p.numel() for p in head.parameters()),
        also_at=tuple(also_at),
    )
    for run in tower:
        first, *others = run.names
        setattr(run.container, first, head)
        for name in others:
            if isinstance(run.container, nn.ModuleList):
                setattr(run.container, name, nn.Identity())
            else:
                delattr(run.container, name)
    return report
