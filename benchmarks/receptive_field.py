"""Where the centre of a trained refinement's output looks: its effective receptive field on real RoI features.

    python benchmarks/receptive_field.py DATA --sweep runs/ablation --output runs/receptive_field

Takes the branches that ablation.py trained, and DATA's unseen objects. Four stacked 3×3 convolutions see 9×9 positions;
what lies outside of them is the share that only a larger field can give. Writes receptive_field.json and .png.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from ablation import load_test_objects, trained_branches
from coco import DataError
from environment import environment
from files import write_json
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import evenly_spaced
from torch import Tensor
from tqdm import tqdm

from ifr_fast.diagnostics import effective_receptive_field

ROWS = ["4 convolutions", "unroll", "IFR"]
REACH = 4  # positions that four 3×3 convolutions see to each side


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


def run(options: argparse.Namespace) -> dict:
    branches = {row: trained_branches(options.sweep, row) for row in options.rows}
    objects = load_test_objects(options.data, options.sweep)
    chosen = evenly_spaced(range(len(objects)), options.rois)
    features = objects.features[chosen]
    rows = {}
    for row, of_seed in tqdm(branches.items(), "receptive fields", dynamic_ncols=True):
        fields = []
        for seed, branch in enumerate(of_seed):
            torch.manual_seed(seed)  # of the mixture of channels that is differentiated
            with torch.no_grad():
                x = branch.reduced(features)
            fields.append(effective_receptive_field(branch.refine, x))
        rows[row] = {"outside": [outside(field) for field in fields], "field": torch.stack(fields).mean(0).tolist()}
    report = {"rois": len(chosen), "environment": environment(torch.device("cpu")), "rows": rows}
    write_json(options.output / "receptive_field.json", report)
    save_picture(options.output / "receptive_field.png", rows)
    return report


def save_picture(path: Path, rows: dict[str, dict]) -> None:
    """Heat maps side by side, in one logarithmic scale."""
    figure = Figure(figsize=(3.4 * len(rows) + 0.8, 3.8), layout="constrained", dpi=110)
    grid = figure.subplots(1, len(rows), squeeze=False)[0]
    top = max(max(map(max, entry["field"])) for entry in rows.values())
    for axes, (row, entry) in zip(grid, rows.items(), strict=True):
        height, width = len(entry["field"]), len(entry["field"][0])
        image = axes.imshow(entry["field"], norm=LogNorm(1e-4 * top, top, clip=True), cmap="magma")
        corner = (width // 2 - REACH - 0.5, height // 2 - REACH - 0.5)
        axes.add_patch(Rectangle(corner, 2 * REACH + 1, 2 * REACH + 1, fill=False, edgecolor="white", linestyle="--"))
        axes.set_title(f"{row}: {100 * statistics.mean(entry['outside']):.1f} % outside 9×9", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=grid, label="|gradient of the centre|, sum 1")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    report = run(options)
    for row, entry in report["rows"].items():
        shares = ", ".join(f"{100 * share:.2f}" for share in entry["outside"])
        print(f"{row}: {shares} % of the gradient outside 9×9, one figure a seed")
    print(f"wrote {options.output / 'receptive_field.json'} and {options.output / 'receptive_field.png'}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"receptive_field.py: error: {error}")
