"""Training and evaluation of a torchvision detector, in one process or in several under torchrun."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.quality.coco import CocoFolder, TrainingStream, detections
from benchmarks.report.files import refuse_changes, write_whole
from ifr_fast import IFRHead, WarmupUnroll

CLIP_NORM = 5.0
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Process:
    """This process's rank among `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over the processes."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def gather(self, entries: list) -> list:
        """The processes' lists joined, in the first process; elsewhere an empty list."""
        if self.world == 1:
            return entries
        gathered = [None] * self.world if self.is_first else None
        distributed.gather_object(entries, gathered)
        return [entry for part in gathered or [] for entry in part]


@contextlib.contextmanager
def joined_processes(device: str, *, deterministic: bool = False) -> Iterator[Process]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or be the only one.

    deterministic: as use_deterministic_algorithms.
    """
    if deterministic:
        use_deterministic_algorithms()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if world > 1:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(rank, world, chosen)
    finally:
        if world > 1:
            distributed.destroy_process_group()


def use_deterministic_algorithms() -> None:
    """From here on GPU algorithms that give the same bits again, with a warning where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


@dataclass(frozen=True)
class Plan:
    """How long, on how many images a step (over all processes), how fast, in which precision to train.

    warmup_steps: iterations, the first ones, that unroll the blocks of IFRHeads.
    """

    iterations: int
    batch_size: int
    lr: float
    seed: int
    bf16: bool = False
    workers: int = 0
    warmup_steps: int = 0

    def lr_at(self, iteration: int) -> float:
        """Linear warm-up over a tenth of the training, 500 iterations at most; then half a cosine to zero."""
        warmup = min(500, math.ceil(self.iterations / 10))
        if iteration < warmup:
            return self.lr * (iteration + 1) / warmup
        progress = (iteration - warmup) / max(1, self.iterations - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Checkpoints:
    """Where training is saved, and after how many iterations. `config` must be the same on resuming."""

    folder: Path
    every: int
    config: dict

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
        """Write all that training needs to go on."""
        state = {
            "config": self.config,
            "history": history,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        write_whole(self.path, lambda file: torch.save(state, file))

    def check(self) -> dict:
        """Read the checkpoint. Raises DataError where it was made with another configuration."""
        state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        refuse_changes(self.path, state["config"], self.config)
        return state

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[dict]:
        """Restore the model and, to train on, the optimizer; returns the history, one entry an iteration.

        Raises DataError where the checkpoint was made with another configuration.
        """
        state = self.check()
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        return state["history"]


def train(
    model: nn.Module,
    stream: TrainingStream,
    plan: Plan,
    process: Process,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train the detector in place with AdamW; returns losses, learning rate and seconds of each iteration.

    Every random choice follows from the seed and the iteration, so a resumed training goes on as if it had
    never stopped. Raises FloatingPointError where the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], weight_decay=WEIGHT_DECAY
    )
    history = checkpoints.load(model, optimizer) if checkpoints and resume else []
    start = len(history)
    warmup = warm_up(model, plan, start)
    loader = DataLoader(stream, batch_sampler=batches(start, plan, process), num_workers=plan.workers, collate_fn=unzip)
    parallel = DistributedDataParallel(model) if process.world > 1 else model
    parallel.train()
    bar = tqdm(
        loader, "training", total=plan.iterations, initial=start, disable=not process.is_first, dynamic_ncols=True
    )
    clock = time.perf_counter()
    for iteration, (images, targets) in enumerate(bar, start):
        seed_iteration(plan.seed, iteration, process.rank)
        lr = plan.lr_at(iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(process.device, plan.bf16):
            losses = parallel(to_device(images, process), [to_device(target, process) for target in targets])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)

        means = process.mean(torch.stack([loss, *losses.values()]).detach().float()).tolist()
        entry = dict(zip(("loss", *losses), means, strict=True))
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(f"the loss is not finite at iteration {iteration}: {entry}; try a lower --lr")
        optimizer.step()
        if warmup:
            warmup.step()
        now = time.perf_counter()
        history.append({"iteration": iteration, **entry, "lr": lr, "seconds": now - clock})
        clock = now
        bar.set_postfix(loss=f"{entry['loss']:.3f}", lr=f"{lr:.1e}")
        done = iteration + 1
        if checkpoints and process.is_first and (done % checkpoints.every == 0 or done == plan.iterations):
            checkpoints.save(model, optimizer, history)
    return history


def warm_up(model: nn.Module, plan: Plan, done: int = 0) -> WarmupUnroll | None:
    """The plan's warm-up of the model's IFRHeads after `done` iterations; None where it has none."""
    if not plan.warmup_steps:
        return None
    warmup = WarmupUnroll(model, plan.warmup_steps)
    warmup.load_state_dict({"count": done})
    return warmup


def batches(start: int, plan: Plan, process: Process) -> list[range]:
    """For each iteration left, the positions in the training stream that are this process's share."""
    size = plan.batch_size
    return [
        range(iteration * size + process.rank, (iteration + 1) * size, process.world)
        for iteration in range(start, plan.iterations)
    ]


def unzip(samples: list[tuple]) -> tuple[tuple, tuple]:
    images, targets = zip(*samples, strict=True)
    return images, targets


def to_device(value, process: Process):
    """Move the tensors in a tensor, sequence or dictionary."""
    if isinstance(value, torch.Tensor):
        return value.to(process.device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, process) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(item, process) for item in value]
    return value


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Proposals and RoIs are sampled with torch's global generators."""
    torch.manual_seed(int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1)[0]))


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@dataclass(frozen=True)
class Findings:
    """Detections in COCO's results format; how far the IFR head's solve of each went; seconds an image."""

    entries: list[dict]
    residuals: list[float]
    iterations: list[int]
    seconds_per_image_with_reading_and_encoding: float


@torch.no_grad()
def evaluate(model: nn.Module, dataset: CocoFolder, process: Process, *, bf16: bool = False) -> Findings:
    """Run the detector on a dataset, each process on its share; the first process gets all findings."""
    model.eval()
    head = next((module for module in model.modules() if isinstance(module, IFRHead)), None)
    entries, residuals, iterations = [], [], []
    share = range(process.rank, len(dataset), process.world)
    clock = time.perf_counter()
    for index in tqdm(share, "evaluating", disable=not process.is_first, dynamic_ncols=True):
        image_id = dataset.image_ids[index]
        image = dataset.image(image_id).float() / 255
        with autocast(process.device, bf16):
            (output,) = model([image.to(process.device)])
        entries += detections(dataset, image_id, output)
        solution = head.last_solution if head is not None else None
        if solution is not None and len(output["boxes"]):
            residuals += solution.residual.tolist()
            iterations += solution.iterations.tolist()
    seconds = (time.perf_counter() - clock) / max(1, len(share))
    return Findings(process.gather(entries), process.gather(residuals), process.gather(iterations), seconds)
