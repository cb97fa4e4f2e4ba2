"""WarmupUnroll: a schedule for the start of a training, stepped by the training loop like a learning-rate scheduler."""

from __future__ import annotations

from typing import Any

from torch import nn

from .checks import check_int
from .head import IFRHead


class WarmupUnroll:
    """Unrolls the blocks of a model's IFRHeads in the first training iterations, instead of solving.

    This is the authors' remedy for a new block that does not contract. Where blocks contract, training without it was
    better. Evaluation always solves. Use it like a learning-rate scheduler:

        warmup = WarmupUnroll(model, steps=2000)
        for images, targets in loader:
            ...
            optimizer.step()
            warmup.step()

    Args:
        model: contains at least one IFRHead, at any depth. From now on this schedule sets their `training_unroll`.
            Copies and pickles of the model take no part in it: they solve.
        steps: number of training iterations that unroll. unroll: how often each of them applies a block (Table 6).

    Raises ValueError for arguments that do not fit. torch.compile compiles a head anew when the warm-up ends.
    """

    def __init__(self, model: nn.Module, steps: int = 2000, unroll: int = 4) -> None:
        check_int("WarmupUnroll", "steps", steps, 0)
        check_int("WarmupUnroll", "unroll", unroll, 1)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}: expected a module")
        self.heads = [module for module in model.modules() if isinstance(module, IFRHead)]
        if not self.heads:
            raise ValueError(f"model is a {type(model).__name__} without an IFRHead: expected at least one")
        self.steps, self.unroll, self.count = steps, unroll, 0
        self._apply()

    def step(self) -> None:
        """Counts a training iteration. Call it after each one."""
        self.count += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The number of iterations so far."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state_dict(). Raises ValueError for anything else."""
        count = state_dict.get("count") if isinstance(state_dict, dict) else None
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"state_dict={state_dict!r}: expected what WarmupUnroll.state_dict() gave")
        self.count = count
        self._apply()

    def _apply(self) -> None:
        for head in self.heads:
            head.training_unroll = self.unroll if self.count < self.steps else 0
