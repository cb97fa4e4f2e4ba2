"""How the plain iteration and the solvers converge on trained blocks: Sec. 3.5 of the paper.

    python benchmarks/analysis/convergence.py DATA --sweep runs/ablation
    python benchmarks/analysis/convergence.py DATA --sweep runs/ablation --rows "IFR, 4 groups" --steps 10000

DATA and the blocks are those of ablation.py's finished sweep; X is what a block is given for one of DATA's unseen
objects. H* is an equilibrium that Broyden's method finds in float64, from where the plain iteration ended.

For the population, evenly spaced objects, and each row, in float32 (IEEE, never TF32):

* the relative step ‖Hⁱ⁺¹ - Hⁱ‖ / ‖Hⁱ⁺¹‖ that a long plain iteration Hⁱ⁺¹ = F(Hⁱ; X) from H⁰ = 0 ends with: an object
  has converged where it is below 1e-4 (rounding leaves 1e-7, an oscillation 1e-1);
* the spectral radius of ∂F/∂H at H*, by power iteration in float64;
* the distance ‖H - H*‖ of what Broyden's method returns, and that relative to ‖H*‖: median, worst and how many objects
  are below the paper's bound, e⁻⁸ = 3.4e-4.

For a few RoIs of the first row's population, from the smallest to the largest spectral radius, those that have not
converged last, far longer and in more detail; in float64, in float32 and with the convolutions in bfloat16 (iterates
stay float32, as in the library):

* the plain iteration, absolute and relative step; where it has converged in float64, H* is its end;
* the spectral radius along the way, in float64;
* each solver's relative residual ‖F(H) - H‖ / ‖F(H)‖ step by step, with F in the solver's own precision;
* the distance of what it returns from H*.

Writes convergence.json and convergence.png.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.sweep import load_test_objects, trained_branch
from benchmarks.report import results_page
from benchmarks.report.convergence_report import CONVERGED, PLAIN, STEADY, save_picture, worst
from benchmarks.report.environment import environment
from benchmarks.report.files import DataError, write_json
from benchmarks.report.pictures import evenly_spaced
from ifr_fast import Anderson, Broyden, IFRHead, Implicit, Picard, Solution, Status, Unroll, fixed_point
from ifr_fast.reference import relative_residual

PRECISIONS = ("float64", "float32", "bfloat16")
SOLVERS = {"Broyden": Broyden, "Anderson": Anderson, "Picard": Picard}
PRODUCTS = 200  # of the power iteration
POPULATION_STEPS = (Broyden().max_iter, 50)  # of Broyden's method


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Exits with a message where a value cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", help="the sweep's folder in COCO format", type=Path)
    add("--sweep", help="ablation.py's output (%(default)s)", type=Path, default=Path("runs/ablation"))
    add("--rows", help="of the sweep (%(default)s)", nargs="+", default=["IFR", "IFR, 4 groups"], metavar="ROW")
    add("--seed", help="of the training, and of the spectrum's first vectors (%(default)s)", type=int, default=0)
    add("--objects", help="of the population (%(default)s)", type=int, default=48)
    add("--object-steps", help="of their plain iteration (%(default)s)", type=int, default=1000)
    add("--rois", help="of the first row's population to study longer (%(default)s)", type=int, default=3)
    add("--steps", help="of the RoIs' plain iteration (%(default)s)", type=int, default=100_000)
    add("--solver-steps", help="(%(default)s)", type=int, nargs="+", default=[15, 50, 200])
    others = list(PRECISIONS[1:])
    add("--precisions", help="beside float64 (%(default)s)", nargs="*", choices=others, default=others)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", help="(%(default)s)", choices=("cpu", "cuda"), default=device)
    add("--output", help="folder (%(default)s)", type=Path, default=Path("runs/convergence"))
    options = parser.parse_args(arguments)
    for name in ("objects", "object_steps", "rois", "steps", "solver_steps"):
        value = getattr(options, name)
        if np.min(value) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {np.min(value)}")
    if options.rois > options.objects:
        parser.error(f"--rois: expected at most {options.objects}, the population's objects, got {options.rois}")
    if options.seed < 0:
        parser.error(f"--seed: expected zero or more, got {options.seed}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as torch finds no GPU here, got cuda")
    options.solver_steps = sorted(set(options.solver_steps))
    return options


@dataclass(frozen=True)
class Equation:
    """H = F(H; X) in one precision: evaluated by the library's block, solved by its head. X: (N, C, H, W)."""

    precision: str
    head: IFRHead
    x: Tensor

    @classmethod
    def make(cls, head: IFRHead, x: Tensor, precision: str) -> "Equation":
        iterate = torch.float64 if precision == "float64" else torch.float32
        head = deepcopy(head).to(iterate).requires_grad_(False)
        head.adjoint = Implicit()  # a sweep's Shine would refuse some solvers
        return cls(precision, head, x.to(iterate))

    def __call__(self, z: Tensor) -> Tensor:
        return self.head.block(z, self.x, getattr(torch, self.precision))

    def residual(self, z: Tensor) -> Tensor:
        return relative_residual(z, self(z) - z)

    def solve(self, solver: Broyden | Anderson | Picard) -> Solution:
        self.head.solver = solver
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            self.head.solve(self.x)
        return self.head.last_solution

    def product(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """w → wᵀ ∂F/∂H at z."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            fz = self(z)
        return lambda w: torch.autograd.grad(fz, z, w, retain_graph=True)[0]


def recorded_steps(steps: int) -> list[int]:
    """Every step up to 100, then 50 a decade, with the powers of ten, and the last one."""
    spaced = (round(10 ** (i / 50)) for i in range(100, math.ceil(50 * math.log10(steps)) + 1))
    return sorted({*range(1, min(steps, 100) + 1), *(step for step in spaced if step <= steps), steps})


def iterate(equation: Equation, steps: int) -> dict[str, Any]:
    """The plain iteration from 0: the last iterate "z"; for every recorded step the "norm" and the "relative" norm of
    the step that led there, RoI by RoI; the "iterates" at powers of ten, and the "seconds" spent."""
    z, clock = torch.zeros_like(equation.x), time.perf_counter()
    found = {"steps": recorded_steps(steps), "norm": [], "relative": [], "iterates": {}}
    recorded = set(found["steps"])
    with parametrize.cached():  # the normalised weights
        for step in tqdm(range(1, steps + 1), equation.precision, dynamic_ncols=True):
            previous, z = z, equation(z)
            if step in recorded:
                norm = norms(z - previous)
                found["norm"].append(finite(norm))
                found["relative"].append(finite(norm / norms(z).clamp_min(1e-30)))
            if math.log10(step).is_integer():
                found["iterates"][step] = z
    return found | {"z": z, "seconds": time.perf_counter() - clock}


def norms(z: Tensor) -> Tensor:
    return z.flatten(1).norm(dim=1)


def limit(equation: Equation, z: Tensor) -> tuple[Tensor, list[str]]:
    """H* given where the plain iteration ended, in float64, and what it was found by, RoI by RoI."""
    converged = equation.residual(z) <= CONVERGED
    found, polish = z, Broyden(max_iter=50, rtol=1e-13)
    if not converged.all():
        for _ in tqdm(range(10), "limit", dynamic_ncols=True):  # each starts from the last one's best iterate
            found = fixed_point(equation, found, solver=polish)[0]
    names = [PLAIN if reached else "Broyden" for reached in converged.tolist()]
    return torch.where(converged.view(-1, 1, 1, 1), z, found), names


def random_like(z: Tensor, seed: int) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype).to(z.device)


def power_iteration(product: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """(N,) the growth of w, averaged over the last half of the products, as a complex leading pair makes it swing."""
    growth = []
    for _ in range(PRODUCTS):
        w = product(w / norms(w).clamp_min(1e-30).view(-1, 1, 1, 1))
        growth.append(norms(w))
    return torch.stack(growth[PRODUCTS // 2 :]).log().mean(0).exp()


def solves(equation: Equation, solver_steps: list[int], h: Tensor) -> list[dict[str, Any]]:
    """Each solver with each number of steps; the trace of relative residuals only of the longest."""
    entries = []
    for name, solver in SOLVERS.items():
        for steps in solver_steps:
            solution = equation.solve(solver(max_iter=steps, rtol=0.0))
            entry = {"solver": name, "precision": equation.precision, "steps": steps}
            entry["status"] = [Status(code).name for code in solution.status.tolist()]
            entry["residual"] = finite(solution.residual)
            if steps == solver_steps[-1]:
                entry["trace"] = [finite(row) for row in solution.trace]
            entries.append(entry | distances(solution.value, h))
    return entries


def distances(z: Tensor, h: Tensor) -> dict[str, list]:
    distance = norms(z.double() - h)
    return {"distance": finite(distance), "relative_distance": finite(distance / norms(h))}


def finite(values: Tensor) -> list[float | None]:
    """JSON knows neither inf nor nan."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


@torch.no_grad()
def problem(options: argparse.Namespace, row: str) -> tuple[IFRHead, Tensor]:
    """The row's trained head, and X of the population, objects spread evenly over the unseen ones, on the device."""
    branch = trained_branch(options.sweep, row, options.seed)
    head = branch.refine
    if not isinstance(head, IFRHead) or isinstance(head.solver, Unroll) or head.block.form == "paper":
        raise DataError(f"rows: {row!r} has no equilibrium to study")
    objects = load_test_objects(options.data, options.sweep)
    if options.objects > len(objects):
        raise DataError(f"objects: expected at most {len(objects)}, those of {options.data}, got {options.objects}")
    chosen = evenly_spaced(range(len(objects)), options.objects)
    return head.to(options.device), branch.to(options.device).reduced(objects.features[chosen].to(options.device))


def population(head: IFRHead, x: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """What `steps` plain steps and Broyden's method make of every object, as the module's docstring has it."""
    equation, exact = (Equation.make(head, x, precision) for precision in ("float32", "float64"))
    z = torch.zeros_like(equation.x)
    with parametrize.cached():
        for _ in tqdm(range(steps), "population", dynamic_ncols=True):
            previous, z = z, equation(z)
    relative = norms(z - previous) / norms(z)
    h, _ = limit(exact, z.double())
    entries = [{"solver": PLAIN, "steps": steps, "residual": finite(equation.residual(z))} | distances(z, h)]
    for solver_steps in POPULATION_STEPS:
        solution = equation.solve(Broyden(max_iter=solver_steps, rtol=0.0))
        entry = {"solver": "Broyden", "steps": solver_steps, "residual": finite(solution.residual)}
        entries.append(entry | distances(solution.value, h))
    return {
        "relative": finite(relative),
        "converged": (relative < STEADY).tolist(),
        "radius": finite(power_iteration(exact.product(h), random_like(h, seed))),
        "limit": {"residual": finite(exact.residual(h)), "norm": norms(h).tolist()},
        "solves": entries,
    }


def representatives(found: dict[str, Any], count: int) -> list[int]:
    """Objects of a population from the smallest spectral radius to the largest, those that have not converged last:
    one of them is among two or more representatives wherever there is one."""
    radius = [math.inf if value is None else value for value in found["radius"]]
    order = sorted(range(len(radius)), key=lambda i: (not found["converged"][i], radius[i]))
    return evenly_spaced(order, count)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    clock = time.perf_counter()
    problems = {row: problem(options, row) for row in options.rows}
    populations = {row: population(*of, options.object_steps, options.seed) for row, of in problems.items()}
    row = options.rows[0]
    head, x = problems[row]
    chosen = representatives(populations[row], options.rois)
    x = x[chosen]
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    equations = {name: Equation.make(head, x, name) for name in PRECISIONS if name in ("float64", *options.precisions)}
    exact = equations["float64"]

    plain = {name: iterate(equation, options.steps) for name, equation in equations.items()}
    h, found_by = limit(exact, plain["float64"]["z"])
    points = [*plain["float64"]["iterates"].items(), ("limit", h)]
    spectra = [
        {"step": step, "radius": finite(power_iteration(exact.product(z), random_like(z, options.seed)))}
        for step, z in tqdm(points, "spectrum", dynamic_ncols=True)
    ]
    entries = []
    for name, equation in tqdm(equations.items(), "solvers", dynamic_ncols=True):
        z = plain[name]["z"]
        entry = {"solver": PLAIN, "precision": name, "steps": options.steps, "residual": finite(equation.residual(z))}
        entries += [*solves(equation, options.solver_steps, h), entry | distances(z, h)]
    return {
        "settings": settings,
        "environment": environment(x.device),
        "elapsed_seconds": time.perf_counter() - clock,
        "population": populations,
        "row": row,
        "chosen": chosen,
        "converged": [populations[row]["converged"][i] for i in chosen],
        "shape": list(x.shape),
        "plain": {
            name: {key: state[key] for key in ("steps", "norm", "relative")}
            | {"seconds_per_step": state["seconds"] / options.steps}
            for name, state in plain.items()
        },
        "limit": {"found_by": found_by, "residual": finite(exact.residual(h)), "norm": norms(h).tolist()},
        "spectrum": spectra,
        "solves": entries,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        report = run(options)
    write_json(options.output / "convergence.json", report)
    save_picture(options.output / "convergence.png", report)
    print(results_page.convergence(report))
    for found in (report["limit"], *(of["limit"] for of in report["population"].values())):
        if worst(found["residual"]) > CONVERGED:
            print("H* is no equilibrium: none was found, and distances to it say little")
    print(f"wrote {options.output / 'convergence.json'} and {options.output / 'convergence.png'}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"convergence.py: error: {error}")
