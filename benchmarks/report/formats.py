"""Figures and tables as they are written."""

import statistics
from collections.abc import Iterable


def cell(figure: dict[str, float] | None, scale: float = 100, form: str = ".1f") -> str:
    """What mean_and_std found."""
    if figure is None:
        return "-"
    return " ± ".join(format(scale * value, form) for value in figure.values())


def interval(gain: dict[str, float]) -> str:
    """In points of a hundred, with its 95 % interval."""
    return f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


def spread(values: Iterable[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_power(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.0e}" if found else "–"
