"""Uses of torch's private names. "Without the name: …" says what happens in a version of torch that lacks it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

# torch's base classes of modules where torch has them, else the public classes.
BATCH_NORMS = getattr(
    nn.modules.batchnorm, "_BatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
)
DROPOUTS = getattr(
    nn.modules.dropout, "_DropoutNd",
    (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)  # fmt: skip


def transforms_active() -> bool:
    """Whether this code runs inside one of torch.func's transforms (grad, vjp, vmap, jvp, …). Without the name: no."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def forward_mode_active() -> bool:
    """Whether this code runs inside forward_ad.dual_level or torch.func.jvp. Without the name: no."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def tracing() -> bool:
    """Whether torch.jit.trace runs this code."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]  # torch does not list it


def reference_count(x: Tensor) -> int | None:
    """How many tensors share x's memory; None where torch does not say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else count(x.untyped_storage()._cdata)


def version(x: Tensor) -> int | None:
    """How often x's memory was changed in place; None where torch does not count (in inference mode)."""
    return None if x.is_inference() else getattr(x, "_version", None)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source to its target. With the name: in one launch."""
    fused = getattr(torch, "_foreach_copy_", None)
    if fused is not None and targets:
        fused(list(targets), list(sources))
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run after the module's call or in its backward pass. Without the names: no."""
    names = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before the module's call. Without the name: none."""
    return list(getattr(module, "_forward_pre_hooks", {}).values())


@cache
def _packs(dtype: torch.dtype) -> bool:
    names = ((torch._C._nn, "mkldnn_reorder_conv2d_weight"), (torch.ops.mkldnn, "_convolution_pointwise"))
    if not all(hasattr(*name) for name in names) or not torch.backends.mkldnn.is_available():
        return False
    narrow: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and narrow())


def packed_conv2d(weight: Tensor, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """torch.conv2d with padding 1 for CPU tensors of x's size, with the weight packed once for oneDNN.

    oneDNN repacks an unpacked weight in every call; at N = 1 that takes as long as the convolution. Returns None if
    torch lacks the names, or if oneDNN does not serve the dtype on this processor.
    """
    if not _packs(weight.dtype):
        return None
    unit, shape = [1, 1], [x.shape[0], weight.shape[1], *x.shape[2:]]
    pack: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = pack(weight.to_mkldnn(), unit, unit, unit, 1, shape)
    convolve = torch.ops.mkldnn._convolution_pointwise
    return lambda x: convolve(x, packed, None, unit, unit, unit, 1, "none", [], "")


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """torch.conv2d with padding 1, differentiable; on a CPU a sample's bits do not depend on its batch mates.

    In float32 torch chooses its algorithm by the number of samples; oneDNN's convolution does not. Without the name:
    torch's choice. In float64 MKL sums in an order that depends on where in memory a sample begins.
    """
    if x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        direct = getattr(torch, "mkldnn_convolution", None)
        if x.dtype == torch.float64 and weight.dtype == x.dtype:
            return _aligned_conv2d(x, weight)
        if x.dtype == torch.float32 and direct and getattr(torch.backends.mkldnn, "enabled", True) and not tracing():
            return direct(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
    return torch.conv2d(x, weight, padding=1)


def _aligned_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """With zeros for channels up to multiples of eight: of 64 bytes, so that every sample begins at one of 64. A sample
    by itself is computed twice, for MKL would divide its sums among threads: two samples have a thread each."""
    outputs, inputs = weight.shape[:2]
    more_outputs, more_inputs = -outputs % 8, -inputs % 8
    single = x.shape[0] == 1 and torch.get_num_threads() > 1 and not tracing()
    if single:
        x = torch.cat([x, x])
    if more_outputs or more_inputs:
        x = F.pad(x, (0, 0, 0, 0, 0, more_inputs))
        weight = F.pad(weight, (0, 0, 0, 0, 0, more_inputs, 0, more_outputs))
    y = torch.conv2d(x, weight, padding=1)
    if not more_outputs:
        return y[:1] if single else y
    dense = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    return y[: 1 if single else None, :outputs].contiguous(memory_format=dense)


def weight_norm(gain: Tensor, direction: Tensor) -> Tensor:
    """gain · direction / ‖direction‖, the norm over all dimensions but the first. With the name: in one kernel."""
    fused = getattr(torch, "_weight_norm", None)
    if fused is not None:
        return fused(direction, gain, 0)
    return direction * (gain / torch.norm_except_dim(direction, 2, 0))


def in_traced_subgraph() -> bool:
    """While torch.compile traces: whether this code is in a region such as torch.utils.checkpoint's, where nothing
    outside may be assigned to. Without the names: no, and the compiler refuses the assignment itself."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (ImportError, AttributeError):
        return False


def is_fake(x: Tensor) -> bool:
    """Whether x is a FakeTensor, which has a shape but no elements. Without the name: no."""
    kind = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return kind is not None and isinstance(x, kind)


def autocast(device: str, enabled: bool, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """torch.autocast, except on the meta device, which it does not support."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=enabled, dtype=dtype)


# These are the marks that torch.compiler.assume_constant_result and torch.compiler.disable set. Calling those would
# import the compiler, which takes a second.
vars(in_traced_subgraph)["_dynamo_marked_constant"] = True


def outside_compile(function: Function) -> Function:
    """`function` so that torch.compile traces nothing of what it calls. not_traced leaves that open."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function  # imports it otherwise


def not_traced(reason: str) -> Callable[[Function], Function]:
    """Marks a function that torch.compile must not trace."""

    def mark(function: Function) -> Function:
        vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return function

    return mark
