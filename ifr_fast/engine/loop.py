"""The engine: evaluate F, store the residual, judge every sample, let the method choose the step.

No decision looks at more than one sample. The loop ends when every sample has stopped: on a CPU at once, on a GPU as
soon as the host knows without waiting (segments.py). Until then finished samples keep their iterate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import RUNNING, Kernels, State, Step, memory_order, pick
from ..solution import Solution
from ..solvers import Solver
from . import segments

# If at most this share of the evaluated samples still runs, only those are evaluated from now on. Gathering them costs
# a fraction of one evaluation.
WORTHWHILE = 3 / 4
# A recording of so many samples can go on with half of them. The convolutions of fewer leave most of a GPU idle.
FEWEST = 32


def solve(
    f: Callable[[Tensor, Any], Any],
    z: Tensor,
    solver: Solver,
    kernels: Kernels,
    *,
    from_zero: bool = False,
    first: Tensor | None = None,
    affine: bool = False,
    select: Callable[[Tensor], Callable[[Tensor, Any], Any]] | None = None,
) -> State:
    """Solves z = f(z) for n samples. Returns the solver's state, which has the fields of a Solution.

    f: maps an iterate and the solver's state to a tensor of the iterate's shape, or to a result of kernels.tail or
    kernels.total.
    z: (n, …) the start, float32 or float64, dense in contract.memory_format(z). It is overwritten.
    solver: resolved. from_zero: z is zero everywhere. first: f(z), if it is known.
    affine: f is affine. Residuals are then relative to the first one, since ‖f‖ of an affine f grows with the error and
    would make the wildest iterate the best.
    select: maps indices of samples to f of these samples. It saves evaluating samples that have stopped: on a CPU, and
    in a recording.
    """
    rtol, stored = solver.resolved()
    evaluations = solver.max_iter + 1
    state = kernels.new_state(z, rows=solver.rows, evaluations=evaluations, history_dtype=stored, from_zero=from_zero)
    course = segments.course(z, rtol)
    _Run(solver, kernels, affine, select, course).evaluate(f, state, z, first=first)
    if course:
        course.solve_ends()
        # Before `finish`, because its kernel may start early, and must not do so on a part of a graph (conditional.py).
        state.trace = segments.carried_on(state.trace, state.iterations)
    kernels.finish(state, z)
    return state


@dataclass(frozen=True)
class _Run:
    """What does not change in a solve. Names as in `solve`."""

    solver: Solver
    kernels: Kernels
    affine: bool
    select: Callable[[Tensor], Callable[[Tensor, Any], Any]] | None
    course: segments.Course | None

    def evaluate(
        self, f: Callable[[Tensor, Any], Any], state: State, z: Tensor, start: int = 0, first: Tensor | None = None
    ) -> None:
        """The evaluations from `start` on."""
        solver, kernels, select, course = self.solver, self.kernels, self.select, self.course
        rtol, _ = solver.resolved()
        evaluations = solver.max_iter + 1
        ends = segments.ends(evaluations)
        index = None  # the samples that are evaluated; None for all
        for k in range(start, evaluations):
            if course and course.none_runs():
                break
            if k == 0 and first is not None:
                fz = first
            elif index is None:
                fz = f(z, state)
            else:
                order = memory_order(z)
                fz = torch.empty_like(z)
                fz.permute(order).index_copy_(0, index, f(pick(z, index), None).permute(order))
            if isinstance(fz, Tensor) and (fz.stride() != z.stride() or fz.dtype != z.dtype):
                fz = torch.empty_like(z).copy_(fz)
            step = Step(solver.method, solver.window, k, k == solver.max_iter, rtol, self.affine)
            running = kernels.step(state, fz, z, step)
            if running == 0:
                state.trace[k + 1 :] = state.trace[k]
                break
            most = WORTHWHILE * (len(z) if index is None else len(index))
            if select and running is not None and running <= most and not kernels.SKIPS_STOPPED:
                index = (state.status == RUNNING).nonzero().squeeze(1)
                f = select(index)
            if not course or k not in ends:
                continue
            if select and len(z) >= FEWEST and k == ends[len(ends) // 2]:
                if course.rehearses:
                    chosen, some, z_some, f_some = self._half(state, z)
                    f_some(z_some, some)
                    state.rejoin(z, some, z_some, chosen)
                elif course.branches:
                    self._branch(f, state, z, k + 1)
                    break
            course.segment_ends(state.status)

    def _branch(self, f: Callable[[Tensor, Any], Any], state: State, z: Tensor, start: int) -> None:
        """The evaluations from `start` on, of half of the samples if no more than these still run."""
        assert self.course is not None
        half = len(z) // 2
        # The smaller half first: it leaves no more samples running, so at most one of the two is run. After the other
        # one, samples that have used up their steps would count as running here.
        with self.course.branch(state.status, 1, half):
            index, some, z_some, f_some = self._half(state, z)
            replace(self, select=None).evaluate(f_some, some, z_some, start)
            self.course.solve_ends()
            state.rejoin(z, some, z_some, index)
        with self.course.branch(state.status, half + 1, len(z)):
            self.evaluate(f, state, z, start)

    def _half(self, state: State, z: Tensor) -> tuple[Tensor, State, Tensor, Callable[[Tensor, Any], Any]]:
        """Half of the samples, first of all those that run: their indices, state, iterate and f."""
        assert self.select is not None
        index = (state.status != RUNNING).byte().argsort(stable=True)[: len(z) // 2]
        return index, *state.select(z, index), self.select(index)


def solution(state: State) -> Solution:
    return Solution(state.value, state.residual, state.iterations, state.trace, state.status)
