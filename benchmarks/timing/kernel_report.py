"""Rates and tables of kernels.py."""


def rate(found: dict) -> None:
    """Adds to every timed case what it reaches, and its share of a forward solve."""
    timed = [c for c in found["cases"] if "seconds" in c]
    ours = [c for c in timed if c["family"] == "forward solve" and c["per_solve"]]
    solves = {(c["backend"], c["size"], c["dtype"], c["history"]): c for c in ours}
    for c in timed:
        if c["flop"]:
            c["tflops"] = c["flop"] / c["seconds"] / 1e12
            c["of_product"] = c["flop"] / c["seconds"] / found["ceilings"]["matmul"]
        elif c["traffic"]:
            c["gbps"] = c["traffic"] / c["seconds"] / 1e9
            c["of_copy"] = c["traffic"] / c["seconds"] / found["ceilings"]["copy"]
        solver = found["backends"][0] if c["backend"] == "cudnn" else c["backend"]
        solve = solves.get((solver, c["size"], c["dtype"], c["history"]))
        if solve and c["per_solve"]:
            c["share"] = c["per_solve"] * c["seconds"] / solve["seconds"]


def print_tables(found: dict) -> None:
    """Of the first size everything, the largest shares first; of the others one line a kernel."""
    for name, rate in found["ceilings"].items():
        print(f"{name}: {rate / 1e12:.4g} {'TFLOP/s' if name == 'matmul' else 'TB/s'}")
    timed = [c for c in found["cases"] if "seconds" in c]
    columns = dict.fromkeys((c["size"], c["dtype"]) for c in timed)
    for size, dtype in list(columns)[:1]:
        print(f"\n{size} {dtype}: µs, × ceiling, share of the forward solve")
        here = [c for c in timed if (c["size"], c["dtype"]) == (size, dtype)]
        for c in sorted(here, key=lambda c: -c.get("share", 0)):
            share = f"{c['share']:6.1%}" if "share" in c else " " * 6
            print(f"{label(c):64} {figures(c)} {share}")
    if len(columns) > 1:
        rows = dict.fromkeys(map(label, timed))
        print("\nµs × ceiling:" + " " * 52 + "".join(f"{size + ' ' + short(dtype):>20}" for size, dtype in columns))
        for row in rows:
            cells = {(c["size"], c["dtype"]): figures(c) for c in timed if label(c) == row}
            print(f"{row:64} " + "".join(f"{cells.get(column, ''):>20}" for column in columns))
    for reason in found["refused"]:
        print(f"not run: {reason}")
    failed = [c for c in found["cases"] if "error" in c]
    for c in failed:
        print(f"failed: {label(c)}, {c['size']} {c['dtype']}: {c['error']}")
    print(f"{len(found['cases']) - len(failed)} ran, {len(failed)} failed, {len(found['not_run'])} left out for time")


def short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float32": "fp32"}[dtype]


def label(c: dict) -> str:
    return f"{c['backend']} {c['family']}" + (f" ({c['variant']})" if c["variant"] else "")


def figures(c: dict) -> str:
    reached = c.get("of_product", c.get("of_copy"))
    return f"{c['seconds'] * 1e6:10.1f}" + ("      " if reached is None else f" {reached:5.2f}")
