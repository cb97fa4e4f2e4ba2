"""Finds out whether a block's modules were changed so that its parameters no longer describe all of F.

The kernels read parameters and call no module, so they would ignore what works through a module's call (adapters, fake
quantisation, hooks, another convolution). Such a block is evaluated by calling its modules (ResidualBlock.forward).
"""

from __future__ import annotations

import logging
import sys
from functools import cache

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ._torch import BATCH_NORMS, DROPOUTS, has_hooks, pre_hooks

logger = logging.getLogger("ifr_fast")

# Hooks that only compute a parameter from others before a call. They can be run without the call.
WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
# The methods that a call runs, as torch defines them. nn.Module.__call__ is not stored here: tools such as torch.export
# replace it for a while.
METHODS: dict[type[nn.Module], dict[str, object]] = {
    nn.Conv2d: {"forward": nn.Conv2d.forward, "_conv_forward": getattr(nn.Conv2d, "_conv_forward", None)},
    nn.GroupNorm: {"forward": nn.GroupNorm.forward},
}
CONVOLUTION: dict[str, object] = {
    "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "bias": None,
    "padding_mode": "zeros",
}  # fmt: skip


def altered_module(module: nn.Module, made: type[nn.Module], options: dict[str, object]) -> str:
    """Why this module must be called, in words; "" if its (possibly parametrised) parameters suffice: then it computes
    what a module of class `made` with the attributes `options` computes."""
    kind = type(module)
    methods = METHODS[made]
    own = any(getattr(kind, name, None) is not method for name, method in methods.items())
    if own or not isinstance(module, made) or kind.__call__ is not nn.Module.__call__:
        return f"is a {kind.__module__}.{kind.__qualname__}"
    if any(name in module.__dict__ for name in methods):
        return "has a forward of its own"
    if hooks := called_hooks(module):
        return hooks
    for name, expected in options.items():
        value = getattr(module, name)
        if isinstance(value, Tensor):
            return f"has a {name}"
        if value != expected:
            return f"has {name}={value}, not {expected}"
    return ""


def called_hooks(module: nn.Module) -> str:
    """Which hooks of the module work through its call, in words; "" if none does."""
    if has_hooks(module):
        return "has hooks"
    if all(isinstance(hook, WEIGHT_HOOKS) for hook in pre_hooks(module)):
        return ""
    return "has forward pre-hooks"


def update_weights(*modules: nn.Module) -> None:
    """Runs the hooks that compute the parameters which these modules' calls would read."""
    for module in modules:
        for hook in pre_hooks(module):
            hook(module, ())


def check_map(block: nn.Module) -> None:
    """Raises ValueError if F cannot be evaluated as often as each solve needs. Dropout makes it another map every time,
    batch statistics make samples depend on each other, and a sharded module waits for other processes.

    A module that changes slowly from call to call is allowed (an observer's range, the power iteration of torch's old
    spectral norm): the solve follows it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in block.named_modules(prefix="block"):
        if fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise ValueError(
                f"{name} is sharded by FSDP: its calls gather parameters from all processes, which evaluate F other "
                "numbers of times. Shard the head as one unit: fully_shard(head), or ModuleWrapPolicy({IFRHead, …})"
            )
        if isinstance(module, DROPOUTS) and module.training and module.p > 0:
            raise ValueError(
                f"{name} drops other entries at each evaluation, so that there is no equilibrium: set p to 0, "
                "call .eval() on it, or drop out before or after the head"
            )
        if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name} normalises by the statistics of the batch, so that samples see each other: use a "
                "GroupNorm, or .eval() it"
            )


@cache
def warn_once(why: str) -> None:
    logger.warning(
        "IFRHead calls its block's modules, since %s: right for any module, but several times slower than the kernels, "
        "with the history of the whole batch in memory and no CUDA graphs",
        why,
    )
