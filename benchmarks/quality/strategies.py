"""The refinements that the ablation compares: the rows of the paper's Tables 1, 6, 7, 8 and 9, and our own."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from benchmarks.quality.detector import SharedConvolution
from ifr_fast import IFRHead, ResidualBlock
from ifr_fast.block import compute_dtype

DEPTH = 4  # of Mask R-CNN's tower
GROUPS = 32
REFERENCES = BASELINE, IFR = "4 convolutions", "IFR"  # what rows are compared with


class UnsharedBlocks(nn.Module):
    """Four residual blocks with weights of their own, each given X: (N, C, H, W) → the same shape (Table 6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, groups=GROUPS) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        injection = x.float()
        z = torch.zeros_like(injection)
        for block in self.blocks:
            z = block(z, injection, compute_dtype(x))
        return z.to(x.dtype)


def normalised_stack(channels: int) -> nn.Sequential:
    """Mask R-CNN's tower with GroupNorm, as detectron2 has it: four times convolution, GroupNorm, ReLU."""
    layers = []
    for _ in range(DEPTH):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.GroupNorm(GROUPS, channels), nn.ReLU()]
    return nn.Sequential(*layers)


def separable_blocks(channels: int) -> nn.Sequential:
    """What is cheap and explicit: four times a depthwise 5×5 convolution, a pointwise one, GroupNorm and ReLU."""
    layers = []
    for _ in range(DEPTH):
        depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.kaiming_normal_(pointwise.weight, mode="fan_out", nonlinearity="relu")
        layers += [depthwise, pointwise, nn.GroupNorm(GROUPS, channels), nn.ReLU()]
    return nn.Sequential(*layers)


BUILDERS = {
    "none": nn.Identity,
    "stack": lambda channels, layers: MaskRCNNHeads(channels, [channels] * layers, dilation=1),
    "stack, GroupNorm": normalised_stack,
    "separable": separable_blocks,
    "shared": SharedConvolution,
    "unshared blocks": UnsharedBlocks,
}


@dataclass(frozen=True)
class Strategy:
    """kind: a key of BUILDERS, or "ifr" for IFRHead. options: its arguments; for "ifr", width is mid_channels /
    channels, warmup the share of the training that unrolls, penalty the weight of jacobian_penalty. tuned: the strategy
    whose learning rate it takes."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    tuned: str = "4 convolutions"
    bf16: bool = True

    def build(self, channels: int) -> nn.Module:
        """(N, channels, H, W) → the same shape."""
        if self.kind != "ifr":
            return BUILDERS[self.kind](channels, **self.options)
        options = {"groups": GROUPS, "width": 1.0, **self.options}
        for of_the_training in ("warmup", "penalty"):
            options.pop(of_the_training, None)
        mid_channels = round(options.pop("width") * channels)
        options["groups"] = math.gcd(options["groups"], mid_channels, channels)
        return IFRHead(channels, mid_channels=mid_channels, **options)

    def warmup_steps(self, iterations: int) -> int:
        """How many of a training's iterations unroll the block."""
        return round(self.options.get("warmup", 0.1) * iterations) if self.kind == "ifr" else 0

    @property
    def penalty(self) -> float:
        return self.options.get("penalty", 0.0)

    def convolutions(self, steps: float | None, channels: int) -> float:
        """A forward pass's arithmetic, in 3×3 convolutions between all channels. steps: of its solve, None without."""
        if self.kind == "ifr":
            evaluations = DEPTH if steps is None else steps + 1
            return 2 * self.options.get("width", 1) * evaluations
        if self.kind == "separable":
            return DEPTH * (5**2 + channels) / (3**2 * channels)
        return {"none": 0, "unshared blocks": 2 * DEPTH}.get(self.kind, self.options.get("layers", DEPTH))


def ifr(*, bf16: bool = True, tuned: str = "IFR", **options: Any) -> Strategy:
    return Strategy("ifr", options, tuned, bf16)


def solved(options: dict[str, Any], **others: Any) -> Strategy:
    """With options for the forward and the backward solve alike, and others."""
    return ifr(solver={"type": "Broyden", **options}, adjoint={"type": "Implicit", **options}, **others)


STRATEGIES = {
    "no convolution": Strategy("none"),
    **{f"{n} convolution{'s' * (n > 1)}": Strategy("stack", {"layers": n}) for n in range(1, DEPTH + 1)},
    "4 convolutions, shared": Strategy("shared", tuned="4 convolutions, shared"),
    "4 convolutions, GroupNorm": Strategy("stack, GroupNorm", tuned="4 convolutions, GroupNorm"),
    "4 separable 5×5 blocks": Strategy("separable", tuned="4 separable 5×5 blocks"),
    "unroll": ifr(solver={"type": "Unroll", "steps": DEPTH}, warmup=0, tuned="unroll"),
    "unroll, paper's form": ifr(form="paper", solver={"type": "Unroll", "steps": DEPTH}, warmup=0, tuned="unroll"),
    "unroll, unshared": Strategy("unshared blocks", tuned="unroll, unshared"),
    "IFR": ifr(),
    # As in the paper these do not stop early: bfloat16 does not reach 1e-6.
    **{f"IFR, {steps} steps": solved({"max_iter": steps, "rtol": 1e-6}) for steps in (3, 5, 10, 15, 20)},
    "IFR, stopping at 1e-1": solved({"rtol": 1e-1}),
    "IFR, C/4 inside, stopping at 1e-1": solved({"rtol": 1e-1}, width=1 / 4),
    "IFR, C/4 inside, 7 steps": solved({"max_iter": 7, "rtol": 1e-6}, width=1 / 4),
    "IFR, C/4 inside, 7 steps, adjoint at 1e-1": ifr(
        solver={"type": "Broyden", "max_iter": 7, "rtol": 1e-6}, adjoint={"type": "Implicit", "rtol": 1e-1}, width=1 / 4
    ),
    **{f"IFR, Jacobian penalty {weight:g}": ifr(penalty=weight) for weight in (0.1, 0.5, 2)},
    "IFR, plain form": ifr(form="plain"),
    "IFR, paper's form": ifr(form="paper"),
    "IFR, C/8 inside": ifr(width=1 / 8),
    "IFR, C/4 inside": ifr(width=1 / 4),
    "IFR, C/2 inside": ifr(width=1 / 2),
    "IFR, 2C inside": ifr(width=2),
    "IFR, 4 groups": ifr(groups=4),
    "IFR, 16 groups": ifr(groups=16),
    "IFR, Anderson": ifr(solver="Anderson"),
    "IFR, Picard": ifr(solver="Picard"),
    "IFR, Phantom": ifr(adjoint="Phantom"),
    "IFR, JacobianFree": ifr(adjoint="JacobianFree"),
    "IFR, Shine": ifr(adjoint="Shine"),
    "IFR, post_gain 0.5": ifr(post_gain=0.5),
    "IFR, post_gain 0.25": ifr(post_gain=0.25),
    "IFR, no warm-up": ifr(warmup=0),
    "IFR, warm-up 0.3": ifr(warmup=0.3),
    "IFR, float32": ifr(bf16=False),
    "4 convolutions, float32": Strategy("stack", {"layers": DEPTH}, bf16=False),
}

# Title → rows. IFR is Broyden of at most 15 steps that stops at a relative residual of 1e-2 (bfloat16's default), 32
# groups, released form, C inside, Implicit, post_gain 1, warm-up 0.1.
TABLES = {
    "Table 1: how many convolutions": [
        "no convolution",
        "1 convolution",
        "2 convolutions",
        "3 convolutions",
        "4 convolutions",
        "4 convolutions, shared",
        "4 convolutions, GroupNorm",
        "4 separable 5×5 blocks",
        "IFR",
    ],
    "Table 6: explicit or implicit": ["unroll, unshared", "unroll", "unroll, paper's form", "IFR"],
    "Table 7: steps, forward and backward": [
        "IFR, 3 steps",
        "IFR, 5 steps",
        "IFR, 10 steps",
        "IFR, 15 steps",
        "IFR, 20 steps",
    ],
    "Table 8: form of the block": ["IFR, plain form", "IFR, paper's form", "unroll, paper's form", "IFR"],
    "Table 9: channels between the block's convolutions": [
        "IFR, C/8 inside",
        "IFR, C/4 inside",
        "IFR, C/2 inside",
        "IFR",
        "IFR, 2C inside",
    ],
    "Stopping early (IFR: at 1e-2)": ["IFR, stopping at 1e-1", "IFR", "IFR, 15 steps"],
    "For the price of four convolutions": [
        "4 convolutions",
        "IFR, C/4 inside, 7 steps",
        "IFR, C/4 inside, 7 steps, adjoint at 1e-1",
        "IFR, C/4 inside, stopping at 1e-1",
        "IFR",
    ],
    "Fewer steps by training for it": [
        "IFR",
        *(f"IFR, Jacobian penalty {weight:g}" for weight in (0.1, 0.5, 2)),
    ],
    "Groups of GroupNorm": ["IFR, 4 groups", "IFR, 16 groups", "IFR"],
    "Solver": ["IFR, Anderson", "IFR, Picard", "IFR"],
    "Adjoint": ["IFR, Phantom", "IFR, JacobianFree", "IFR, Shine", "IFR"],
    "Initial gain of the last norm": ["IFR, post_gain 0.25", "IFR, post_gain 0.5", "IFR"],
    "Share of the training that unrolls first": ["IFR, no warm-up", "IFR", "IFR, warm-up 0.3"],
    "Precision": ["4 convolutions, float32", "4 convolutions", "IFR, float32", "IFR"],
}
