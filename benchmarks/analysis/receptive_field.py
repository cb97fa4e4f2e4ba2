"""Where the centre of a trained refinement's output looks: its effective receptive field on real RoI features.

    python benchmarks/analysis/receptive_field.py DATA --sweep runs/ablation --output runs/receptive_field

Takes the branches that ablation.py trained, and DATA's unseen objects. Four stacked 3×3 convolutions see 9×9 positions:
what lies outside of them takes a larger field. GroupNorm alone has one, as its mean and variance are of all positions.
So a second figure is taken with these held constant: what convolutions and the equilibrium reach without them. Writes
receptive_field.json and .png.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.sweep import load_test_objects, trained_branches
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import DataError, write_json
from benchmarks.report.pictures import evenly_spaced
from ifr_fast import IFRHead, Implicit, ResidualBlock, Unroll, fixed_point
from ifr_fast.diagnostics import effective_receptive_field
from ifr_fast.reference import residual_block

ROWS = ["4 convolutions", "4 convolutions, GroupNorm", "unroll", "IFR"]
REACH = 4  # positions that four 3×3 convolutions see to each side
ADJOINT = Implicit(max_iter=100, rtol=1e-5)  # the gradient itself, however a row was trained


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="the sweep's folder in COCO format", type=Path)
    parser.add_argument("--sweep", help="ablation.py's output (%(default)s)", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--rows", help="of the sweep (%(default)s)", nargs="+", default=ROWS, metavar="ROW")
    parser.add_argument("--rois", help="to average over (%(default)s)", type=int, default=64)
    parser.add_argument("--output", help="folder (%(default)s)", type=Path, default=Path("runs/receptive_field"))
    options = parser.parse_args(arguments)
    if options.rois < 1:
        parser.error(f"--rois: expected at least 1, got {options.rois}")
    return options


def outside(field: Tensor) -> float:
    """The share of a field (H, W) that four 3×3 convolutions at its centre do not see."""
    y, x = field.shape[0] // 2, field.shape[1] // 2
    seen = field[max(0, y - REACH) : y + REACH + 1, max(0, x - REACH) : x + REACH + 1]
    return max(0.0, 1 - (seen.sum() / field.sum()).item())


class HeldStatistics(TorchFunctionMode):
    """To autograd the mean and variance of torch's group norms are constants."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (held_norm if func in (torch.group_norm, F.group_norm) else func)(*args, **(kwargs or {}))


def held_norm(y: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *_: bool) -> Tensor:
    grouped = y.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped.detach(), (2, 3, 4), correction=0, keepdim=True)
    normalised = ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2)
    return normalised * weight[:, None, None] + bias[:, None, None]


def specified(refinement: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same refinement made of torch's own operators, which a mode can change."""
    refinement = deepcopy(refinement)
    for block in refinement.modules():
        if isinstance(block, ResidualBlock):
            block.forward = lambda z, x, dtype=None, block=block: residual_block(
                z, x, block.tensors(), form=block.form, groups=block.groups
            )
    if not isinstance(refinement, IFRHead) or isinstance(refinement.solver, Unroll):
        return refinement
    return lambda x: fixed_point(
        lambda z: refinement.block(z, x), torch.zeros_like(x), solver=refinement.solver, adjoint=refinement.adjoint
    )[0]


def fields(refinement: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Receptive fields (H, W): of the refinement, and with GroupNorm's statistics held."""
    refinement = deepcopy(refinement)
    if isinstance(refinement, IFRHead):
        refinement.adjoint = ADJOINT
    torch.manual_seed(seed)  # of the mixture of channels that is differentiated
    gradient = effective_receptive_field(refinement, x)
    torch.manual_seed(seed)
    with HeldStatistics():
        return {"gradient": gradient, "statistics held": effective_receptive_field(specified(refinement), x)}


def run(options: argparse.Namespace) -> dict:
    branches = {row: trained_branches(options.sweep, row) for row in options.rows}
    objects = load_test_objects(options.data, options.sweep)
    chosen = evenly_spaced(range(len(objects)), options.rois)
    features = objects.features[chosen]
    rows = {}
    for row, of_seed in tqdm(branches.items(), "receptive fields", dynamic_ncols=True):
        found = {"gradient": [], "statistics held": []}
        for seed, branch in of_seed.items():
            with torch.no_grad():
                x = branch.reduced(features)
            for name, field in fields(branch.refine, x, seed).items():
                found[name].append(field)
        rows[row] = {
            name: {"outside": [outside(field) for field in of], "field": torch.stack(of).mean(0).tolist()}
            for name, of in found.items()
        }
    report = {"rois": len(chosen), "environment": environment(torch.device("cpu")), "rows": rows}
    write_json(options.output / "receptive_field.json", report)
    save_picture(options.output / "receptive_field.png", rows)
    return report


def save_picture(path: Path, rows: dict[str, dict]) -> None:
    """Heat maps in one logarithmic scale: a column a row of the sweep, the gradient above that with held statistics."""
    figure = Figure(figsize=(3.4 * len(rows) + 0.8, 7.6), layout="constrained", dpi=110)
    grid = figure.subplots(2, len(rows), squeeze=False)
    top = max(max(map(max, entry["field"])) for found in rows.values() for entry in found.values())
    for column, (row, found) in zip(grid.T, rows.items(), strict=True):
        for axes, (name, entry) in zip(column, found.items(), strict=True):
            height, width = len(entry["field"]), len(entry["field"][0])
            image = axes.imshow(entry["field"], norm=LogNorm(1e-4 * top, top, clip=True), cmap="magma")
            corner, side = (width // 2 - REACH - 0.5, height // 2 - REACH - 0.5), 2 * REACH + 1
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linestyle="--"))
            share = f"{100 * statistics.mean(entry['outside']):.1f} % outside 9×9"
            axes.set_title(f"{row}\n{name}: {share}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.colorbar(image, ax=grid, label="|gradient of the centre|, sum 1")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    report = run(options)
    print(results_page.receptive_field(report))
    print(f"wrote {options.output / 'receptive_field.json'} and {options.output / 'receptive_field.png'}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"receptive_field.py: error: {error}")
