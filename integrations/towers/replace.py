"""An IFRHead put in place of each conv tower of any model."""

from typing import Any

import torch
from torch import nn

from ifr_fast import IFRHead

from .find import Tower, Where, beside_the_tree, find_towers, globs_of, join, matches
from .layers import a_kind
from .report import Replacement, Report, Skipped


def replace_towers(model: nn.Module, where: Where | None = None, **ifr_kwargs: Any) -> Report:
    """Replaces every conv tower of `model`, in place, by `IFRHead(channels, **ifr_kwargs)`.

    A tower is a run of 3×3 convolutions that keep their input's shape (stride 1, dilation 1, padding 1 of zeros, one
    group, as many channels out as in), with nothing but norms and activations between. integrations/README.md says
    which code is understood.

    Args:
        model: any nn.Module. Every nn.Sequential, nn.ModuleList and plain list of a module's own children is searched.
        where: which towers. None: all of three convolutions or more, also those of a backbone without shortcuts
            (VGG). A glob or a list of globs ("*.cls_convs", "roi_heads"): each is matched against the path of the new
            IFRHead and of all that holds it, and must lead to a replacement. Or a callable (path, container) -> bool.
            What is named is trusted where the source does not tell: a run of two convolutions, a container whose use
            is unknown and a wrapper that calls something unknown are replaced too. Of the latter two the container
            itself must be named ("head.convs", "*.convs"; not "head", "*"). "" names the model itself.
        ifr_kwargs: passed to IFRHead.

    Returns a Report: a list of Replacement, with the list of Skipped as its attribute `skipped`.

    The IFRHead takes its tower's device, dtype, memory format and mode, and the name of the first layer. The other
    names of a Sequential that is called whole go. Elsewhere they hold nn.Identity, so that `len(convs)`, `convs[i]` and
    `zip(convs, others)` stay right; a plain list of the layers follows. All other names, hence checkpoint keys, stay.
    The parameters are new and require gradients: call this before the optimizer is built and the model is wrapped or
    compiled.

    Raises ValueError, before anything is changed: where `model` is no nn.Module, `where` is of another type or leads
    to no replacement (the message says what was found), or IFRHead refuses a tower that `where` names; and for wrong
    options what IFRHead raises.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
    globs = globs_of(where)
    _check(ifr_kwargs)
    towers, skipped = find_towers(model, where)
    heads: list[tuple[Tower, IFRHead]] = []
    for tower in towers:
        try:
            heads.append((tower, _build_head(tower, ifr_kwargs)))
        except ValueError as error:
            channels = tower.convolutions[0].in_channels
            if where is not None:
                raise ValueError(f"IFRHead for {tower.path}, {channels} channels: {error}") from error
            skipped.append(Skipped(tower.path, f"{channels} channels: {error}"))
    paths = [path for tower, _ in heads for path in tower.names()]
    for glob in globs or ["*"]:
        if not any(matches(path, glob) for path in paths):
            raise ValueError(_nothing_replaced(model, glob if globs else where, skipped))
    beside = beside_the_tree(model)
    return Report([_install(tower, head, beside) for tower, head in heads], skipped)


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
    others = [] if where is None else [tower.path for tower in find_towers(model, None)[0]]
    return f"{said}; its towers are at {', '.join(others)}" if others else said


def _check(ifr_kwargs: dict[str, Any]) -> None:
    """Raises what IFRHead raises for options that are wrong whatever the tower: all but its channels is known."""
    groups = ifr_kwargs.get("groups")
    with torch.device("meta"):  # takes no random number
        IFRHead(int(groups) if isinstance(groups, int) and groups > 0 else 256, **ifr_kwargs)


def _build_head(tower: Tower, ifr_kwargs: dict[str, Any]) -> IFRHead:
    first = tower.convolutions[0]
    head = IFRHead(first.in_channels, **ifr_kwargs)
    head.to(device=first.weight.device, dtype=first.weight.dtype)
    if first.weight.is_contiguous(memory_format=torch.channels_last) and not first.weight.is_contiguous():
        head.to(memory_format=torch.channels_last)
    return head.train(first.training)


def _install(tower: Tower, head: IFRHead, beside: list[tuple[str, nn.Module, str]]) -> Replacement:
    first, *others = tower.layers
    new: dict[int, nn.Module] = {id(tower.layers[first]): head}  # what takes a layer's place in a plain list
    setattr(tower.container, first, head)
    for name in others:
        if not tower.by_place:
            delattr(tower.container, name)
        else:
            new[id(tower.layers[name])] = identity = nn.Identity()
            setattr(tower.container, name, identity)
    gone = {id(layer) for layer in tower.layers.values()} - new.keys()
    own = {id(layer) for layer in tower.layers.values() if tower.holders() & set(layer.modules())}
    for _, module, attribute in beside:
        held = vars(module)[attribute]
        if isinstance(held, list) and own & set(map(id, held)):
            held[:] = [new.get(id(element), element) for element in held if id(element) not in gone]
    return Replacement(
        path=tower.path,
        channels=tower.convolutions[0].in_channels,
        convolutions=len(tower.convolutions),
        layers=tuple(join(tower.paths[0], name) for name in tower.layers),
        parameters_before=sum(p.numel() for p in {p for m in tower.modules() for p in m.parameters()}),
        parameters_after=sum(p.numel() for p in head.parameters()),
    )
