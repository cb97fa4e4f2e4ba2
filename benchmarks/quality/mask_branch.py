"""Mask R-CNN's mask branch on frozen features of objects: trained alone and evaluated."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from benchmarks.quality.objects import FINE, PREDICTED, Objects
from benchmarks.quality.strategies import Strategy
from benchmarks.quality.training import CLIP_NORM, WEIGHT_DECAY, Plan, autocast, warm_up
from ifr_fast import IFRHead, WarmupUnroll, jacobian_penalty
from ifr_fast.diagnostics import adjoint_residual


class MaskBranch(nn.Module):
    """(N, inputs, 14, 14), standardised here → logits (N, 28, 28): a 1×1 reduction to `channels`, the refinement
    under test, Mask R-CNN's deconvolution and predictor, one mask for all classes."""

    def __init__(self, mean: Tensor, std: Tensor, channels: int, refinement: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        self.reduce = nn.Conv2d(len(mean), channels, 1)
        self.refine = refinement
        self.predict = MaskRCNNPredictor(channels, channels, 1)
        nn.init.normal_(self.predict.mask_fcn_logits.weight, std=0.01)  # as in detector.py
        self.to(memory_format=torch.channels_last)

    def reduced(self, features: Tensor) -> Tensor:
        """What the refinement is given: (N, channels, 14, 14)."""
        x = (features.float() - self.mean) / self.std
        return self.reduce(x.contiguous(memory_format=torch.channels_last))

    def forward(self, features: Tensor) -> Tensor:
        return self.predict(self.refine(self.reduced(features)))[:, 0]


@dataclass(frozen=True)
class Splits:
    """Objects to train on, to choose learning rates and the best epoch by, and to report; on the device that trains."""

    train: Objects
    validation: Objects
    test: Objects
    mean: Tensor
    std: Tensor

    @classmethod
    def make(cls, given: Objects, test: Objects, device: torch.device) -> "Splits":
        """A seventh of the given objects' images validates. test: of images that `given` lacks."""
        train, validation = given.split(1 / 7)
        sample = train.features[:: max(1, len(train) // 400)].float()
        mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)) + 1e-3
        parts = (train, validation, test)
        return cls(*(part.to(device) for part in parts), mean.to(device), std.to(device))

    @property
    def device(self) -> torch.device:
        return self.mean.device


def train_branch(
    strategy: Strategy, splits: Splits, *, channels: int, epochs: int, batch_size: int, lr: float, seed: int
) -> tuple[MaskBranch, dict]:
    """Train one strategy; returns the branch, and what is to be reported of it.

    "test" and "validation" are of the end of the training, when the learning rate has come down. On a CPU "seconds" are
    of processor time, so that several trainings may share the machine.
    Raises FloatingPointError where the loss is not finite.
    """
    device = splits.device
    iterations = epochs * math.ceil(len(splits.train) / batch_size)
    warmup_steps = strategy.warmup_steps(iterations)
    plan = Plan(iterations, batch_size, lr, seed, bf16=strategy.bf16, warmup_steps=warmup_steps)
    torch.manual_seed(seed)
    model = MaskBranch(splits.mean, splits.std, channels, strategy.build(channels)).to(device)
    warmup = warm_up(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    epochs_done = []
    for epoch in range(epochs):
        clock = seconds(device)
        model.train()
        losses = [
            train_step(model, optimizer, batch, plan, warmup, iteration, strategy.penalty)
            for iteration, batch in enumerate(shuffled(splits.train, plan, epoch), epoch * iterations // epochs)
        ]
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}")
        spent = seconds(device) - clock
        validation = evaluate(model, splits.validation, bf16=plan.bf16)
        epochs_done.append({"loss": loss, "validation_iou": validation["iou"], "seconds": spent})
    some = splits.test[: 4 * batch_size]
    report = {
        "parameters": sum(parameter.numel() for parameter in model.refine.parameters()),
        "epochs": epochs_done,
        "train": splits.train.counts,
        "validation": validation,
        "seconds_per_epoch": statistics.median(entry["seconds"] for entry in epochs_done),
        "test": evaluate(model, splits.test, bf16=plan.bf16),
        "backward_residual": backward_residual(model, some, bf16=plan.bf16),
        "jacobian": squared_jacobian(model, some, bf16=plan.bf16),
    }
    return model, report


def shuffled(objects: Objects, plan: Plan, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, features and masks, by the seed; half of the objects are mirrored."""
    device = objects.images.device
    generator = torch.Generator().manual_seed(1_000_003 * plan.seed + epoch)
    order = torch.randperm(len(objects), generator=generator)
    mirrored = torch.rand(len(objects), generator=generator) < 0.5
    for indices in order.split(plan.batch_size):
        at, flip = indices.to(device), mirrored[indices].to(device)[:, None, None]
        features, masks = objects.features[at], objects.masks[at]
        yield torch.where(flip[..., None], features.flip(-1), features), torch.where(flip, masks.flip(-1), masks)


def train_step(
    model: MaskBranch,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    plan: Plan,
    warmup: WarmupUnroll | None,
    iteration: int,
    penalty: float,
) -> Tensor:
    """Returns the masks' loss, on the device. penalty: the weight of the Jacobian's, which begins after the warm-up."""
    features, masks = batch
    for group in optimizer.param_groups:
        group["lr"] = plan.lr_at(iteration)
    with autocast(features.device, plan.bf16):
        x = model.reduced(features)
        loss = of_masks = mask_loss(model.predict(model.refine(x))[:, 0], masks)
        if penalty and not model.refine.training_unroll:
            loss = of_masks + penalty * jacobian_penalty(model.refine, x)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    if warmup:
        warmup.step()
    return of_masks.detach()


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """logits (N, 28, 28) against the share of each cell that the masks (N, 112, 112) cover."""
    targets = F.avg_pool2d(masks[:, None].float(), FINE // PREDICTED)[:, 0]
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


@torch.no_grad()
def evaluate(model: MaskBranch, objects: Objects, *, bf16: bool) -> dict[str, Any]:
    """Mean mask IoU, the shares of objects above 0.5 and 0.75, and where the refinement solves its median relative
    residual and mean iterations; "images", their ids, with each one's number of "objects" and the sum of their IoUs,
    "iou_sums". Objects are seen in their annotated boxes, and masks compared at 112×112."""
    model.eval()
    ious, residuals, iterations = [], [], []
    for indices in torch.arange(len(objects), device=objects.images.device).split(64):
        features, masks = objects.features[indices], objects.masks[indices]
        with autocast(features.device, bf16):
            logits = model(features)
        probabilities = F.interpolate(logits.float().sigmoid()[:, None], size=FINE, mode="bilinear")[:, 0]
        found = probabilities > 0.5
        common, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
        ious.append(common / either.clamp_min(1))
        solution = getattr(model.refine, "last_solution", None)
        if solution is not None:
            residuals.append(solution.residual)
            iterations.append(solution.iterations)
    iou = torch.cat(ious)
    figures = {"iou": iou.mean(), "above_50": (iou > 0.5).float().mean(), "above_75": (iou > 0.75).float().mean()}
    if residuals:
        figures |= {"residual": torch.cat(residuals).median(), "iterations": torch.cat(iterations).float().mean()}
    found = {name: value.item() for name, value in figures.items()}
    images, at, counts = (value.cpu() for value in objects.images.unique(return_inverse=True, return_counts=True))
    sums = torch.zeros(len(images), dtype=torch.float64).index_add_(0, at, iou.cpu().double())
    sums = [round(value, 4) for value in sums.tolist()]
    return {**found, "images": images.tolist(), "objects": counts.tolist(), "iou_sums": sums}


def backward_residual(model: MaskBranch, objects: Objects, *, bf16: bool) -> float | None:
    """The median relative residual of the adjoint equation for the loss's own gradient; None without such a one."""
    head = model.refine
    if not isinstance(head, IFRHead) or head.last_solution is None or not head.adjoint.solves:
        return None
    model.eval()
    features, masks = objects.features, objects.masks
    with autocast(features.device, bf16):
        x = model.reduced(features).detach()
        refined = head(x).detach().requires_grad_()
        (grad,) = torch.autograd.grad(mask_loss(model.predict(refined)[:, 0], masks), refined)
        return adjoint_residual(head, x, grad).median().item()


def squared_jacobian(model: MaskBranch, objects: Objects, *, bf16: bool) -> float | None:
    """‖∂F/∂z‖² / D at the equilibria, the mean over the objects; None without a solve."""
    if getattr(model.refine, "last_solution", None) is None:
        return None
    model.eval()
    with torch.no_grad(), autocast(objects.features.device, bf16):
        return jacobian_penalty(model.refine, model.reduced(objects.features)).item()


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
