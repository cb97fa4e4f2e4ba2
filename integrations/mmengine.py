"""What training a model with IFRHeads under mmengine needs: the warm-up schedule, and what the solver reaches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ifr_fast import IFRHead, Unroll
from ifr_fast.diagnostics import spectral_radius

POWER_ITERATIONS = 20  # the radius to a few hundredths, for the price of a backward solve


@HOOKS.register_module()
class IFRHook(Hook):
    """Unrolls the blocks of a model's IFRHeads at first, then logs what their solvers reach.

    warmup_iters: for so many training iterations each block is unrolled `warmup_unroll` times, the authors' remedy
      for a new block, which need not contract. Validation always solves. Counted by the runner's iteration, hence
      right after resuming and whatever the number of feature levels (ifr.warmup_steps counts forward passes).
    interval: every so many iterations the main process logs ifr_residual (median over the samples), ifr_iterations
      (mean) and ifr_spectral_radius (of the first sample of the head's last call in that iteration: the coarsest
      level of a pyramid); of several IFRHeads, the largest. Other iterations wait for no device. What a compiled
      model (compile=True) solves is not seen, hence not logged.
    warn_above: a residual above it there, or one that is not finite, is warned of, once until it recovers.

    Raises ValueError for arguments that do not fit; on training where the model has no IFRHead.
    """

    def __init__(
        self, warmup_iters: int = 0, warmup_unroll: int = 4, interval: int = 50, warn_above: float = 0.05
    ) -> None:
        for name, value, least in (
            ("warmup_iters", warmup_iters, 0),
            ("warmup_unroll", warmup_unroll, 1),
            ("interval", interval, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"IFRHook({name}={value!r}): expected an integer ≥ {least}")
        if not isinstance(warn_above, int | float) or not warn_above > 0:
            raise ValueError(f"IFRHook(warn_above={warn_above!r}): expected a number > 0")
        self.warmup_iters, self.interval, self.warn_above = warmup_iters, interval, warn_above
        self.unroll = Unroll(warmup_unroll)
        self._watched: list[_Watched] = []

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        heads = [(path, m) for path, m in model.named_modules() if isinstance(m, IFRHead)]
        if not heads:
            raise ValueError(
                f"IFRHook: {type(model).__name__} has no IFRHead; in a configuration write e.g. "
                "mask_head=dict(type='IFRFCNMaskHead'), or remove the hook"
            )
        self._watched = [_Watched(path, head) for path, head in heads]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        for watched in self._watched:
            watched.unroll(self.unroll if runner.iter < self.warmup_iters else None)
            if self.every_n_train_iters(runner, self.interval) and is_main_process():
                watched.listen()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        reached = {watched: watched.summary() for watched in self._watched}
        reached = {watched: summary for watched, summary in reached.items() if summary is not None}
        for name in _Summary.__dataclass_fields__ if reached else ():
            largest = max(getattr(summary, name) for summary in reached.values())
            runner.message_hub.update_scalar(f"train/ifr_{name}", largest)
        for watched, summary in reached.items():
            is_bad = not summary.residual <= self.warn_above
            if is_bad and not watched.is_bad:
                runner.logger.warning(self._advice(watched, summary))
            watched.is_bad = is_bad

    def before_val(self, runner: Runner) -> None:
        for watched in self._watched:
            watched.unroll(None)

    after_train = before_val

    def _advice(self, watched: "_Watched", summary: "_Summary") -> str:
        return (
            f"{watched.path}: the equilibrium is not reached. After {summary.iterations:.0f} iterations of "
            f"{watched.solver} the median relative residual is {summary.residual:.1e}, above warn_above="
            f"{self.warn_above:g} (spectral radius {summary.spectral_radius:.2f}; below 1 the block contracts). The "
            "head's output then depends on where the solver stopped. What helps: a longer warm-up (IFRHook's "
            "warmup_iters), more steps (ifr.solver.max_iter), a smaller ifr.post_gain, a lower learning rate."
        )


@dataclass(frozen=True)
class _Summary:
    residual: float
    iterations: float
    spectral_radius: float


class _Watched:
    """One IFRHead, its own solver, and what its forward passes leave while it is listened to."""

    def __init__(self, path: str, head: IFRHead) -> None:
        self.path, self.head, self.solver = path, head, head.solver
        self.is_bad = False
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._stop: Callable[[], None] | None = None

    def unroll(self, unroll: Unroll | None) -> None:
        """Unroll in place of solving; None to solve again."""
        if unroll is None and self.head.solver is not self.solver:
            self.head.solver = self.solver
        elif unroll is not None and self.head.solver is not unroll:
            self.head.solver = unroll

    def listen(self) -> None:
        """Keep what every forward pass reaches, a pyramid's levels included, until summary()."""
        self._calls = []
        self._stop = self.head.register_forward_hook(self._keep).remove

    def _keep(self, head: IFRHead, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        solution = head.last_solution
        if solution is not None and len(solution.residual):
            self._calls.append((solution.residual, solution.iterations, inputs[0][:1].detach()))

    def summary(self) -> _Summary | None:
        """What was reached since listen(); None where nothing was solved. Waits for the device."""
        if self._stop is None:
            return None
        self._stop()
        self._stop = None
        if not self._calls:
            return None
        residuals, iterations, features = zip(*self._calls, strict=True)
        self._calls = []
        residual, mean = torch.cat(residuals).median(), torch.cat(iterations).double().mean()
        last, x = self.head.last_solution, features[-1]
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # logging changes no random choice
            radius = spectral_radius(self.head, x, iterations=POWER_ITERATIONS)
        self.head.last_solution = last
        return _Summary(float(residual), float(mean), float(radius))
