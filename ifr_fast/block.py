"""ResidualBlock: the parameters of F and its differentiable evaluation."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._torch import autocast, conv2d, forward_mode_active, transforms_active
from .altered import CONVOLUTION, altered_module, called_hooks, update_weights
from .checks import DTYPES, check_bool
from .engine.linearise import FORMS
from .kernels import choose, weight_cache
from .kernels.contract import EPS, wide
from .ops import norms as _  # noqa: F401  (registers the ops)
from .weight_norm import adopted, is_torchs, normalised


class ResidualBlock(nn.Module):
    """The weight-tied residual block F(z; X) of Implicit Feature Refinement.

    Let R = z + X and Y = GN2(conv2(ReLU(GN1(conv1(R))))). The 3×3 convolutions have no bias and map C → mid_channels →
    C. form="released" is GN3(ReLU(Y + R)), the authors' code and the form that converges. form="plain" is GN3(ReLU(Y))
    (Table 8). form="paper" is Y + R (Eq. 5). It has no equilibrium in general and serves the ablation only.

    Args:
        channels: C. mid_channels: None means channels. groups: of every GroupNorm; must divide channels and
            mid_channels.
        weight_norm: reparametrise both convolutions by torch's weight normalisation (dim 0).
        post_gain: initial weight of GN3. Below 1 the block contracts more strongly and the solver converges in fewer
            steps; 1 gave the better masks.
        backend: as for IFRHead.

    Convolutions are initialised as in Mask R-CNN (He et al.'s normal distribution, fan out). With weight_norm their
    `weight` is computed from other parameters, so `init.normal_(conv.weight)` changes a copy. Assign instead
    (`conv.weight = tensor`), initialise `conv.parametrizations.weight.original1`, or build with weight_norm=False.

    The kernels read the parameters and do not call the modules. If a module was exchanged, adapted or hooked
    (`altered`), F calls the modules instead, which is several times slower. Raises ValueError for arguments that do not
    fit.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        form: str = "released",
        groups: int = 32,
        mid_channels: int | None = None,
        weight_norm: bool = True,
        post_gain: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        choose.check(backend)
        mid_channels = channels if mid_channels is None else mid_channels
        if form not in FORMS:
            raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
        for name, value in (("channels", channels), ("mid_channels", mid_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
            if not isinstance(groups, int) or groups < 1 or value % groups:
                raise ValueError(
                    f"groups={groups!r} does not divide {name}={value}: pass a divisor of channels and mid_channels, "
                    f"e.g. groups={math.gcd(channels, mid_channels, 32)}"
                )
        if not isinstance(post_gain, (int, float)) or not math.isfinite(post_gain):
            raise ValueError(f"post_gain={post_gain!r}: expected a finite number")
        check_bool("weight_norm", weight_norm)
        if form == "paper":
            warnings.warn(
                "form='paper' (Eq. 5 as printed) has no equilibrium in general: z = F(z; X) demands GN2(…) = -X there, "
                "and the iterates grow without bound. Use form='released', the authors' model, unless for an ablation.",
                stacklevel=2,
            )
        self.channels, self.mid_channels, self.form, self.groups = channels, mid_channels, form, groups
        self.backend = backend
        self.conv1 = nn.Conv2d(channels, mid_channels, 3, padding=1, bias=False)
        self.gn1 = nn.GroupNorm(groups, mid_channels, EPS)
        self.conv2 = nn.Conv2d(mid_channels, channels, 3, padding=1, bias=False)
        self.gn2 = nn.GroupNorm(groups, channels, EPS)
        if form != "paper":
            self.gn3 = nn.GroupNorm(groups, channels, EPS)
            nn.init.constant_(self.gn3.weight, post_gain)
        self._free_weights_at_the_end()
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if weight_norm:
                normalised(conv)

    def altered(self) -> str:
        """Why F must call the block's modules, in words; "" if F depends on nothing but their parameters."""
        if why := called_hooks(self):
            return f"the block {why}"
        if type(self).forward is not ResidualBlock.forward or "forward" in self.__dict__:
            return "the block has a forward of its own"
        for name, module in self.named_children():
            if name.startswith("conv"):
                why = altered_module(module, nn.Conv2d, CONVOLUTION)
            else:
                why = altered_module(module, nn.GroupNorm, {"num_groups": self.groups, "eps": EPS, "affine": True})
            if why:
                return f"{name} {why}"
        return ""

    def tensors(self) -> list[Tensor]:
        """F's parameters in reference.residual_block's order, with the convolutions' effective weights."""
        update_weights(*self.children())
        norms = [[n.weight, n.bias] for n in (self.gn1, self.gn2, *([self.gn3] if self.form != "paper" else []))]
        return [self.conv1.weight, *norms[0], self.conv2.weight, *(t for norm in norms[1:] for t in norm)]

    def tensors_for(self, x: Tensor) -> list[Tensor]:
        """tensors(). Raises ValueError that names one whose shape, dtype or device does not fit the block and x."""
        tensors = self.tensors()
        inside, outside = (self.mid_channels,), (self.channels,)
        shapes = [(*inside, *outside, 3, 3), inside, inside, (*outside, *inside, 3, 3), *[outside] * 4]
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=False)):
            if tensor.shape != shape or tensor.device != x.device or tensor.dtype not in DTYPES:
                name = ("conv1", "gn1", "gn1", "conv2", "gn2", "gn2", "gn3", "gn3")[i]
                raise ValueError(
                    f"block.{name}.{'bias' if i in (2, 5, 7) else 'weight'} has shape {tuple(tensor.shape)} and dtype "
                    f"{tensor.dtype} on {tensor.device}: expected {shape}, a floating dtype, and x's device, {x.device}"
                )
        return tensors

    def forward(self, z: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """F(z; X) for z and x of shape (N, C, H, W), in z's dtype. Differentiable in z, x and the parameters.

        dtype: what the convolutions compute in; None means compute_dtype(x). Raises ValueError if a parameter does not
        fit.
        """
        dtype = dtype or compute_dtype(x)
        # torch.func's transforms and forward mode do not see inside our ops; ONNX does not know them.
        if self.altered() or transforms_active() or forward_mode_active() or torch.onnx.is_in_onnx_export():
            return self.by_calls(z, x, dtype)
        affine = wide(dtype)
        conv1, gn1_weight, gn1_bias, conv2, *norms = self.tensors_for(x)
        norm1, norms = ([t.to(affine).contiguous() for t in ts] for ts in ((gn1_weight, gn1_bias), norms))
        options = self.groups, self.backend
        with autocast(x.device.type, enabled=False):
            r = (z + x).to(dtype)
            y = conv2d(r, conv1.to(dtype))
            h = torch.ops.ifr_fast.norm_relu(y, *norm1, *options)[0]
            y = conv2d(h, conv2.to(dtype))
            out = torch.ops.ifr_fast.norm_tail(y, None if self.form == "plain" else r, norms, *options)[0]
        return out.to(z.dtype)

    def own_dtype(self, default: torch.dtype) -> torch.dtype:
        """The parameters' dtype: that of GN1's weight, else of the first floating tensor; default if there is none."""
        tensors = [getattr(self.gn1, "weight", None), *self.parameters(), *self.buffers()]
        return next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), default)

    def by_calls(self, z: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """F by the modules' calls, under autocast if `dtype` has 16 bits and their parameters another dtype. It has all
        derivatives, where forward has one."""
        own = self.own_dtype(dtype)
        narrow = dtype.itemsize == 2 and own != dtype
        norm = _exported_norm if torch.onnx.is_in_onnx_export() and not self.altered() else _called
        with autocast(x.device.type, narrow, dtype if narrow else None):
            r = (z + x).to(own)
            h = F.relu(norm(self.gn1, self.conv1(r)))
            y = norm(self.gn2, self.conv2(h.to(own)))
            if y.shape != r.shape:
                raise ValueError(f"block.gn2 gave shape {tuple(y.shape)}: expected {tuple(r.shape)}, as x has")
            if self.form != "plain":
                y = y + r
            return (y if self.form == "paper" else norm(self.gn3, F.relu(y))).to(z.dtype)

    def _free_weights_at_the_end(self) -> None:
        weakref.finalize(self, weight_cache.forget_weights).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._free_weights_at_the_end()

    def __getstate__(self) -> dict[str, Any]:
        # Torch cannot pickle a module that its own weight_norm has parametrised.
        modules = {name: adopted(m) if is_torchs(m) else m for name, m in self.named_children()}
        return {**self.__dict__, "_modules": modules}

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


def _called(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _exported_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) in float32 at least, for ONNX. What torch makes of a group norm fails where N = 0."""
    size = x.shape[1] // norm.num_groups * x.shape[2] * x.shape[3]
    groups = x.to(wide(x.dtype)).reshape(-1, norm.num_groups, size)
    one = torch.ones(norm.num_groups, dtype=groups.dtype, device=x.device)
    y = torch.instance_norm(groups, one, torch.zeros_like(one), None, None, True, 0.0, norm.eps, False)
    return y.view(-1, *x.shape[1:]) * norm.weight[:, None, None] + norm.bias[:, None, None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The convolutions' dtype: autocast's if on (float64 ignores it), else x's; on a CPU float32 instead of float16."""
    device, dtype = x.device.type, x.dtype
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype
