"""What exported heads cost in ONNX Runtime on a CPU, beside the exported stack of convolutions and torch's own.

    python benchmarks/timing/onnx_heads.py
    python benchmarks/timing/onnx_heads.py --n 1 16 --threads 1

All rows are timed in turns within one run, on smooth features drawn anew for every round. "ms": the median of the wall
time; "CPU ms": of the processor time of all threads. "× stack": the time over that of torch's stack at the same N in
the same round, median and quartiles of the rounds; "× exported": over that of the exported stack. "residual": the
relative residual of what the row returned, median and worst of the samples, by the specification. "off": the largest
difference from the same module in torch, relative to its largest entry. Exported solves take every step; torch's here
do too, but for the row "to 1e-3". ONNX Runtime's threads do not spin, so that they take nothing from the other rows.
Writes onnx.json, with the operators and bytes of every file.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.report.environment import environment
from benchmarks.report.files import write_json
from benchmarks.timing import measure
from benchmarks.timing.contenders import Setting, block_residual, specified
from benchmarks.timing.features import smooth_features
from benchmarks.timing.measure import Timed, quartiles, ratios
from ifr_fast import Anderson, Broyden, IFRHead, Picard, Unroll

CPU = torch.device("cpu")
STACK, RUNTIME = "4 convolutions", "ONNX Runtime"


@dataclass
class Row:
    """run(x): the row's output, of torch or of ONNX Runtime. file: what was exported, its operators and bytes."""

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    file: dict[str, int] = field(default_factory=dict)
    timed: dict[int, Timed] = field(default_factory=dict)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=[1, 16], help="batch sizes (1 16)")
    add("--channels", type=int, default=256, help="(%(default)s)")
    add("--size", type=int, default=14, help="height and width (%(default)s)")
    add("--steps", type=int, default=15, help="of every solver (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    add("--budget", type=float, default=90, help="seconds of timing, where 3 runs of each fit (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    add("--out", type=Path, default=Path("runs/onnx"), help="folder for the results (%(default)s)")
    return parser.parse_args(arguments)


def modules(setting: Setting) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, module, and whether it is exported too."""
    exact = {"max_iter": setting.steps, "rtol": 0.0}
    yield STACK, setting.stack(), True
    yield "IFR Broyden", setting.head(solver=Broyden(**exact)), True
    yield "IFR Broyden, direct convolutions", setting.head(solver=Broyden(**exact), convolution="direct"), False
    yield "IFR Broyden to 1e-3", setting.head(solver=Broyden(setting.steps)), False
    yield "IFR Anderson", setting.head(solver=Anderson(**exact)), True
    yield "IFR Picard", setting.head(solver=Picard(**exact)), True
    yield "unroll of 4", setting.head(solver=Unroll(4)), True


def exported(module: nn.Module, x: Tensor, threads: int) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
    """The module in ONNX Runtime, for any N; and its file's operators and bytes."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the stack too
        path = Path(folder, "head.onnx")
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
        file = {"operators": len(onnx.load(path).graph.node), "bytes": path.stat().st_size}
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), file


def rows(setting: Setting, size: int, threads: int) -> list[Row]:
    x, found = torch.randn(2, setting.channels, size, size), []
    for name, module, export in modules(setting):
        module.eval()
        found.append(Row(name, module, module))
        if export:
            found.append(Row(f"{name}, {RUNTIME}", module, *exported(module, x, threads)))
    return found


def report(row: Row, n: int, x: Tensor, stacks: dict[str, Timed]) -> dict:
    """Times in seconds; ratios are (first quartile, median, third quartile)."""
    timed, y = row.timed[n], row.run(x)
    found = {"name": row.name, "n": n, "median": timed.median, "file": row.file, "seconds": list(timed.walls.values())}
    found["processor_median"] = quartiles(sample.processor for sample in timed.samples.values())[1]
    found["ratio"] = quartiles(ratios(timed.walls, stacks[STACK].walls))
    found["exported_ratio"] = quartiles(ratios(timed.walls, stacks[f"{STACK}, {RUNTIME}"].walls))
    if isinstance(row.module, IFRHead):
        residual = block_residual(specified(row.module), x, y)
        found["residual"] = residual.median().item(), residual.max().item()
    if row.file:
        expected = row.module(x)
        found["difference"] = ((y - expected).abs().max() / expected.abs().max()).item()
    return found


def print_rows(found: list[dict]) -> None:
    print("| N | row | ms | CPU ms | × stack | × exported | residual | off | operators | MB |\n|" + "---|" * 10)
    for row in found:
        low, middle, high = row["ratio"]
        residual = "{:.0e}, {:.0e}".format(*row["residual"]) if "residual" in row else "–"
        off = f"{row['difference']:.0e}" if "difference" in row else "–"
        file = f"{row['file']['operators']} | {row['file']['bytes'] / 1e6:.1f}" if row["file"] else "– | –"
        times = f"{row['median'] * 1e3:.1f} | {row['processor_median'] * 1e3:.1f}"
        ratio = f"{middle:.2f} ({low:.2f}–{high:.2f}) | {row['exported_ratio'][1]:.2f}"
        print(f"| {row['n']} | {row['name']} | {times} | {ratio} | {residual} | {off} | {file} |")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict:
    """Measure, print and write; returns what onnx.json holds."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    facts = environment(CPU) | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    generator = torch.Generator().manual_seed(options.seed)
    draw = partial(smooth_features, channels=options.channels, size=options.size, generator=generator)
    inputs = {n: draw(n) for n in options.n}
    everything = rows(Setting(options.channels, options.steps, options.seed, CPU), options.size, options.threads)
    for row in everything:
        for n, x in inputs.items():
            row.run(x)  # the first call transforms weights, or plans memory
            call = partial(row.run, x)
            row.timed[n] = Timed(lambda call=call: call, every_round=row.name.startswith(STACK))

    def renew() -> None:
        for n, x in inputs.items():
            x.copy_(draw(n))

    timed = [row.timed[n] for n in options.n for row in everything]
    measure.time_in_turns(timed, CPU, options.budget, before_round=renew)
    found = []
    for n, x in inputs.items():
        stacks = {row.name: row.timed[n] for row in everything if row.name.startswith(STACK)}
        found += [report(row, n, x, stacks) for row in everything]
    found = {"environment": facts, "options": {**vars(options), "out": str(options.out)}, "rows": found}
    write_json(options.out / "onnx.json", found)
    print_rows(found["rows"])
    return found


if __name__ == "__main__":
    main()
