"""What the hooks of mmengine and detectron2 share: the warm-up, and what the solvers reach."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ifr_fast import IFRHead, WarmupUnroll
from ifr_fast.diagnostics import spectral_radius

POWER_ITERATIONS = 20  # the radius to a few hundredths, for the price of a backward solve


class TrainingHook:
    """Steps a model's warm-up (ifr_fast.WarmupUnroll), logs what its IFRHeads' solvers reach, and warns.

    Args:
        warmup_iters: so many training iterations unroll the blocks in place of solving. The framework's iteration
            counts, so that a resumed training goes on where it was. Validation and testing always solve.
        warmup_unroll: how often an unroll applies its block.
        interval: every so many iterations the main process logs ifr_residual (median over the samples),
            ifr_iterations (mean) and ifr_spectral_radius (of the first sample of the head's last call: the coarsest
            level of a pyramid). Of several IFRHeads it logs the largest. Nothing is logged of an unroll or of a
            compiled model. Only these iterations wait for the device.
        warn_above: a logged residual above it, or one that is not finite, is warned of, once until it recovers.

    Raises ValueError for arguments that do not fit; when training starts, for a model without an IFRHead.
    """

    def __init__(
        self, warmup_iters: int = 0, warmup_unroll: int = 4, interval: int = 50, warn_above: float = 0.05
    ) -> None:
        least = {"warmup_iters": 0, "warmup_unroll": 1, "interval": 1}
        for name, value in zip(least, (warmup_iters, warmup_unroll, interval), strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
                raise ValueError(f"IFRHook({name}={value!r}): expected an integer ≥ {least[name]}")
        if not isinstance(warn_above, int | float) or not warn_above > 0:
            raise ValueError(f"IFRHook(warn_above={warn_above!r}): expected a number > 0")
        self.warmup_iters, self.warmup_unroll = warmup_iters, warmup_unroll
        self.interval, self.warn_above = interval, warn_above

    def start(self, model: nn.Module, iteration: int, example: str) -> None:
        """Before the first of the iterations still to come. example: how a configuration asks for an IFRHead."""
        self._watched = [_Watched(path, m) for path, m in model.named_modules() if isinstance(m, IFRHead)]
        if not self._watched:
            raise ValueError(
                f"IFRHook: {type(model).__name__} has no IFRHead; in a configuration write e.g. {example}, or remove "
                "the hook"
            )
        self._warmup = WarmupUnroll(model, self.warmup_iters, self.warmup_unroll)
        self._warmup.load_state_dict({"count": iteration})

    def listen(self, iteration: int) -> None:
        """Before an iteration, in the main process."""
        if (iteration + 1) % self.interval == 0:
            for watched in self._watched:
                watched.listen()

    def finish(self) -> tuple[dict[str, float], list[str]]:
        """After an iteration: what to log, by name, and what to warn of."""
        self._warmup.step()
        reached = {watched: summary for watched in self._watched if (summary := watched.summary())}
        warnings = []
        for watched, summary in reached.items():
            was_bad, watched.is_bad = watched.is_bad, not summary["ifr_residual"] <= self.warn_above
            if watched.is_bad and not was_bad:
                warnings.append(self._advice(watched, summary))
        summaries = list(reached.values())
        names = summaries[0] if summaries else ()
        return {name: max(summary[name] for summary in summaries) for name in names}, warnings

    def _advice(self, watched: "_Watched", reached: dict[str, float]) -> str:
        return (
            f"{watched.path}: the equilibrium is not reached. After {reached['ifr_iterations']:.0f} iterations of "
            f"{watched.head.solver} the median relative residual is {reached['ifr_residual']:.1e}, above warn_above="
            f"{self.warn_above:g} (spectral radius {reached['ifr_spectral_radius']:.2f}; below 1 the block contracts). "
            "The head's output then depends on where the solver stopped. What helps: a longer warm-up (IFRHook's "
            "warmup_iters), more steps (the solver's max_iter), a smaller post_gain, a lower learning rate."
        )


class _Watched:
    """One IFRHead, and what its forward passes reach while it is listened to."""

    def __init__(self, path: str, head: IFRHead) -> None:
        self.path, self.head, self.is_bad = path, head, False
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._listener: RemovableHandle | None = None

    def listen(self) -> None:
        """Keeps what every training pass reaches, of each level of a pyramid, until summary()."""
        self._listener = self.head.register_forward_hook(self._keep)

    def _keep(self, head: IFRHead, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        solution = head.last_solution if head.training else None  # detectron2 evaluates between a step and its hooks
        if solution is not None and len(solution.residual):
            self._calls.append((solution.residual, solution.iterations, inputs[0][:1].detach()))

    def summary(self) -> dict[str, float]:
        """What was reached since listen(), by the names logged; {} where nothing was solved. Waits for the device."""
        if self._listener is not None:
            self._listener.remove()
        if not self._calls:
            return {}
        residuals, iterations, features = zip(*self._calls, strict=True)
        self._calls = []
        residual, mean = torch.cat(residuals).median(), torch.cat(iterations).double().mean()
        last, x = self.head.last_solution, features[-1]
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # logging changes no random choice
            radius = spectral_radius(self.head, x, iterations=POWER_ITERATIONS)
        self.head.last_solution = last
        return {"ifr_residual": float(residual), "ifr_iterations": float(mean), "ifr_spectral_radius": float(radius)}
