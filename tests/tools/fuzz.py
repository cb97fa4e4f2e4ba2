"""The fuzzer: random calls of IFRHead and fixed_point, and what must hold of each.

    python tests/tools/fuzz.py --cases 100000 --processes 2
    python tests/tools/fuzz.py --only CASE_SEED

Prints every kind of failure with the seed of its smallest case; exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass

import torch
from fuzz_cases import random_case
from fuzz_properties import failures
from fuzz_refusals import random_refusal, unrefused

REFUSALS = 0.05  # of the cases are calls that must be refused


@dataclass
class Failures:
    """Of one kind: how many, and the smallest case's size, seed and message."""

    count: int = 0
    smallest: tuple[int, int, str] = (sys.maxsize, 0, "")

    def add(self, count: int, smallest: tuple[int, int, str]) -> None:
        self.count += count
        self.smallest = min(self.smallest, smallest)


def seeds(seed: int, cases: int) -> range:
    return range(seed * 1_000_000, seed * 1_000_000 + cases)


def run_case(seed: int) -> tuple[int, dict[str, str]]:
    """The case's size, and what does not hold of it."""
    draw = random.Random(seed)
    if draw.random() < REFUSALS:
        name, call, value = random_refusal(draw)
        wrong = unrefused(name, call, value)
        return 0, {f"refusal of {name}": wrong} if wrong else {}
    with torch.random.fork_rng(devices=[]):
        case = random_case(seed)
        found = failures(case)
    return case.x.numel(), {f"{case.target}: {kind}": message for kind, message in found}


def run_cases(cases: range, current=None) -> dict[str, Failures]:
    """current: where the case being run is written, for the parent of a process that crashes."""
    kinds: dict[str, Failures] = {}
    for seed in cases:
        if current is not None:
            current.value = seed
        size, found = run_case(seed)
        for kind, message in found.items():
            kinds.setdefault(kind, Failures()).add(1, (size, seed, message))
    return kinds


def report(kinds: dict[str, Failures]) -> str:
    lines = []
    for kind, found in sorted(kinds.items(), key=lambda item: -item[1].count):
        _, seed, message = found.smallest
        lines.append(f"{found.count:6} {kind}\n       smallest: --only {seed}: {message}")
    return "\n".join(lines)


def _work(cases: range, current, results) -> None:
    torch.set_num_threads(1)
    results.put(run_cases(cases, current))


def run_processes(cases: range, processes: int) -> dict[str, Failures]:
    context = multiprocessing.get_context("spawn")
    results, workers = context.Queue(), []
    for i in range(processes):
        current = context.Value("q", -1)
        workers.append((context.Process(target=_work, args=(cases[i::processes], current, results)), current))
        workers[-1][0].start()
    kinds: dict[str, Failures] = {}
    for _ in workers:
        while results.empty() and any(w.is_alive() for w, _ in workers):
            time.sleep(0.1)
        if results.empty():
            break
        for kind, found in results.get().items():
            kinds.setdefault(kind, Failures()).add(found.count, found.smallest)
    for worker, current in workers:
        worker.join()
        if worker.exitcode:
            kinds[f"a process ended with {worker.exitcode}"] = Failures(
                1, (0, current.value, "it left its other cases")
            )
    return kinds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--only", type=int, metavar="CASE_SEED", help="run this case alone and say what it is")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(argv)
    if options.only is not None:
        torch.set_num_threads(1)
        for name, value in random_case(options.only).words.items():
            print(f"{name}: {value}")
        kinds = run_cases(range(options.only, options.only + 1))
    else:
        start = time.time()
        kinds = run_processes(seeds(options.seed, options.cases), options.processes)
        took = f"{time.time() - start:.0f} s"
        print(f"{options.cases} cases from --seed {options.seed} in {took}: {len(kinds)} kinds of failure")
    print(report(kinds))
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main())
