"""The kernel `rule`: from partial sums of a step to every sample's status and the coefficients of its next step.

One program serves one sample, with its K×K matrices in registers. The state is stored in float32. The arithmetic is in
float64, which costs nothing beside the latency of the loads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..contract import Status
from .launch import jit
from .tiles import RUNNING, begin, power_of_2

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)  # the largest relative residual reported
CONVERGED, DIVERGED, NONFINITE = (
    tl.constexpr(code.value) for code in (Status.CONVERGED, Status.DIVERGED, Status.NONFINITE)
)


class RuleTile(NamedTuple):
    """Launch configuration: K rows and M of Anderson's differences, both padded to powers of two, and how many parts
    are summed at a time."""

    K: int
    M: int
    PARTS: int
    num_warps: int


def rule_tile(method: str, rows: int, window: int) -> RuleTile:
    k = power_of_2(rows)
    m = power_of_2(max(min(window, rows) - 1, 1)) if method == "anderson" else 1
    warps = 1 if k <= 16 else 4 if k == 32 else 8
    return RuleTile(k, m, min(128, 4096 // k), warps)


@jit(wide=())
def rule_kernel(norm_partials, gram_partials, gram, p, q, step, total, best,
                norms, residual, trace, status, iterations, improved, scales, next_scale,
                n, size, rows, parts, splits, evaluation, row, window, affine, rtol, divergence, ridge,
                METHOD: tl.constexpr, K: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """eager.assess. Then, if row ≥ 0, METHOD's step for a sample that still runs. Takes DeviceState's fields.

    Of a history in 8 bits it also chooses the next row's scale, and puts the rows' scales into M and `total`.
    """
    begin()
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(status + sample) != RUNNING:
        previous = tl.load(trace + tl.maximum(evaluation - 1, 0).to(tl.int64) * n + sample)
        tl.store(trace + evaluation.to(tl.int64) * n + sample, previous)
        return
    index = tl.arange(0, K)
    old_total = tl.load(total + sample * rows + index, (index < rows) & (evaluation > 0), other=0.0)
    if scales is not None:
        scale = tl.load(next_scale + sample)
    code, is_best, g2 = _judge(norm_partials, norms, residual, trace, iterations,
                           sample, n, parts, evaluation, affine, rtol, divergence, PARTS)  # fmt: skip
    tl.store(status + sample, code)
    tl.store(improved + sample, is_best)
    if is_best | (evaluation == 0):
        tl.store(best + sample * rows + index, old_total, index < rows)
    if (code == RUNNING) & (row >= 0):
        if scales is not None:
            tl.store(scales + sample * rows + row, scale)
            tl.store(next_scale + sample, _scale(g2, size))
        if METHOD == "picard":
            chosen = (index == row).to(tl.float64)
        else:
            square = sample * rows * rows
            first = tl.maximum(row - window + 1, 0)
            partials = gram_partials + sample * splits * rows
            factors = None  # the products of a history's rows have their scales' product
            if scales is not None:
                factors = _row_scales(scales + sample * rows, scale, row, index).to(tl.float64) * scale
            newest = _finish_gram(partials, gram + square, factors, rows, splits, row, first, K, PARTS)
            # The step that led here. Its coefficients of this row and later ones are zero.
            led = tl.load(step + sample * rows + index, index < row, other=0.0)
            if METHOD == "broyden":
                chosen = _broyden(gram + square, p + square, q + square, newest, led.to(tl.float64), rows, row, K)
            else:
                chosen = _anderson(gram + square, p + square, led, rows, row, first, ridge, K, M)
        tl.store(step + sample * rows + index, chosen.to(tl.float32), index < rows)
        if scales is not None:
            chosen *= _row_scales(scales + sample * rows, scale, row, index)
        tl.store(total + sample * rows + index, (old_total + chosen).to(tl.float32), index < rows)


@jit(wide=())
def first_scale_kernel(norm_partials, next_scale, size, parts, PARTS: tl.constexpr):
    """The scale that a sample's first residual has by its own norm."""
    begin()
    sample = tl.program_id(0).to(tl.int64)
    g2 = tl.zeros([PARTS], tl.float64)
    start = 0
    while start < parts:
        part = start + tl.arange(0, PARTS)
        g2 += tl.load(norm_partials + (sample * parts + part) * 2, part < parts, other=0.0).to(tl.float64)
        start += PARTS
    tl.store(next_scale + sample, _scale(tl.sum(g2, 0), size))


@triton.jit
def _row_scales(scales, newest, row, index):
    """The scales of rows `index`. The newest may be on its way to memory."""
    return tl.where(index == row, newest, tl.load(scales + index, index < row, other=1.0))


@triton.jit
def _scale(g2, size):
    """eager.row_scale."""
    rms = tl.sqrt(g2 / size).to(tl.float32)
    power = (rms.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((rms > 0) & (rms < float("inf")), power, 1.0)


@triton.jit
def _judge(norm_partials, norms, residual, trace, iterations, sample, n, parts, evaluation, affine, rtol,
           divergence, PARTS: tl.constexpr):  # fmt: skip
    """The status of a running sample, whether this evaluation is its best, and ‖g‖²."""
    # Loaded before the sums, in which warps wait for each other. Later, another warp may have overwritten them.
    lowest = tl.load(residual + sample, evaluation > 0, other=float("inf"))
    first_g = tl.load(norms + sample * 3 + 2, evaluation > 0, other=0.0).to(tl.float64)
    g2 = tl.zeros([PARTS], tl.float64)
    f2 = tl.zeros([PARTS], tl.float64)
    start = 0
    while start < parts:  # not `for`: Triton's interpreter cannot range over a kernel's argument under NumPy 2.4
        part = start + tl.arange(0, PARTS)
        at = norm_partials + (sample * parts + part) * 2
        g2 += tl.load(at, part < parts, other=0.0).to(tl.float64)
        f2 += tl.load(at + 1, part < parts, other=0.0).to(tl.float64)
        start += PARTS
    g2_sum, f2_sum = tl.sum(g2, 0), tl.sum(f2, 0)
    g, f = tl.sqrt(g2_sum), tl.sqrt(f2_sum)
    first_g = tl.where(evaluation > 0, first_g, g)
    tl.store(norms + sample * 3, g2_sum.to(tl.float32))
    tl.store(norms + sample * 3 + 1, f2_sum.to(tl.float32))
    tl.store(norms + sample * 3 + 2, first_g.to(tl.float32))

    scale = tl.where(affine != 0, first_g, f)
    finite = (g < float("inf")) & (scale < float("inf"))  # false for NaN too
    relative = tl.where(scale > 0, g / tl.where(scale > 0, scale, 1.0), LARGEST)
    relative = tl.where(g > 0, tl.minimum(relative, LARGEST), 0.0)
    relative = tl.where(finite, relative, float("nan")).to(tl.float32)
    is_best = finite & (relative < lowest)
    tl.store(residual + sample, tl.where(is_best, relative, lowest))
    tl.store(trace + evaluation.to(tl.int64) * n + sample, relative)
    tl.store(iterations + sample, evaluation.to(tl.int64))
    code = tl.where(g > divergence * first_g, DIVERGED, RUNNING)
    code = tl.where(relative <= rtol, CONVERGED, code)
    return tl.where(finite, code, NONFINITE), is_best, g2_sum


@triton.jit
def _finish_gram(partials, gram, factors, rows, splits, row, first, K: tl.constexpr, PARTS: tl.constexpr):
    """Sums and stores the Gram matrix's row and column `row`. Returns row [K] as stored, zero outside first … row."""
    j = tl.arange(0, K)
    known = (j >= first) & (j <= row)
    newest = tl.zeros([K], tl.float64)
    start = 0
    while start < splits:
        split = start + tl.arange(0, PARTS)
        there = (split < splits)[:, None] & known[None, :]
        newest += tl.sum(tl.load(partials + split[:, None] * rows + j[None, :], there, other=0.0).to(tl.float64), 0)
        start += PARTS
    if factors is not None:
        newest *= factors
    stored = newest.to(tl.float32)
    tl.store(gram + row * rows + j, stored, known)
    tl.store(gram + j * rows + row, stored, known)
    tl.debug_barrier()  # other threads read these values back
    return stored.to(tl.float64)


@triton.jit
def _broyden(gram, p, q, newest, led, rows, k, K: tl.constexpr):
    """gram.broyden_coefficients: returns the next step [K], and stores the new pair."""
    i = tl.arange(0, K)[:, None]
    j = tl.arange(0, K)[None, :]
    at = i * rows + j
    known = (i <= k) & (j <= k)
    pairs = (i < k - 1) & (j <= k)
    matrix = tl.load(gram + at, known, other=0.0).to(tl.float64)
    p_old = tl.load(p + at, pairs, other=0.0).to(tl.float64)
    q_old = tl.load(q + at, pairs, other=0.0).to(tl.float64)
    # Sums run over rows and columns in turn. The Gram matrix is symmetric, so it fits either.
    index = tl.arange(0, K)
    unit = (index == k).to(tl.float64)
    y = unit - (index == k - 1).to(tl.float64)
    gram_y = newest - tl.load(gram + (k - 1) * rows + index, (index <= k) & (k > 0), other=0.0).to(tl.float64)
    gram_step = tl.sum(matrix * led[:, None], 0)
    q_new = tl.sum(q_old * tl.sum(p_old * gram_step[None, :], 1)[:, None], 0) - led
    scale = tl.sum(q_new * gram_y, 0)
    p_new = led + y - tl.sum(p_old * tl.sum(q_old * gram_y[None, :], 1)[:, None], 0)
    p_new = (p_new / tl.where(scale != 0, scale, 1.0)).to(tl.float32)
    q_new = q_new.to(tl.float32)
    # The first residual has no pair: its scale is zero.
    finite = (tl.abs(p_new) < float("inf")) & (tl.abs(q_new) < float("inf"))
    usable = (scale != 0) & (tl.min(finite.to(tl.int32), 0) == 1)
    p_new = tl.where(usable, p_new, 0.0)
    q_new = tl.where(usable, q_new, 0.0)
    there = (index < rows) & (k > 0)
    tl.store(p + (k - 1) * rows + index, p_new, there)
    tl.store(q + (k - 1) * rows + index, q_new, there)
    chosen = unit - tl.sum(p_old * tl.sum(q_old * newest[None, :], 1)[:, None], 0)
    return chosen - p_new.to(tl.float64) * tl.sum(q_new.to(tl.float64) * newest, 0)


@triton.jit
def _anderson(gram, p, led, rows, k, first, ridge, K: tl.constexpr, M: tl.constexpr):
    """gram.anderson_coefficients: returns the next step [K]. Stores the step that led here among the past ones in p."""
    index = tl.arange(0, K)
    tl.store(p + (k - 1) * rows + index, led, (index < rows) & (k > 0))
    tl.debug_barrier()
    # Equation i belongs to the difference g_{first+i+1} - g_{first+i}. Equations past the window are padding: 1·γ = 0.
    count = k - first
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, M)[None, :]
    corner = gram + (first + i) * rows + first + j
    inside = (i < count) & (j < count)
    normal = tl.load(corner + rows + 1, inside, other=0.0).to(tl.float64)
    normal -= tl.load(corner + rows, inside, other=0.0)
    normal -= tl.load(corner + 1, inside, other=0.0)
    normal += tl.load(corner, inside, other=0.0)
    equation = tl.arange(0, M)
    column = gram + (first + equation) * rows + k
    right = tl.load(column + rows, equation < count, other=0.0).to(tl.float64)
    right -= tl.load(column, equation < count, other=0.0)
    trace = tl.sum(tl.sum(tl.where(i == j, normal, 0.0), 1), 0)
    diagonal = tl.where(i < count, tl.where(trace > 0, ridge * trace, 1.0), 1.0)
    gamma = _solve(tl.where(i == j, normal + diagonal, normal), right, M)

    row = first + tl.arange(0, M)[:, None]
    step = tl.load(p + row * rows + index[None, :], (row < k) & (index[None, :] < rows), other=0.0).to(tl.float64)
    step += (index[None, :] == row + 1).to(tl.float64) - (index[None, :] == row).to(tl.float64)
    return (index == k).to(tl.float64) - tl.sum(step * gamma[:, None], 0)


@triton.jit
def _solve(matrix, right, M: tl.constexpr):
    """matrix⁻¹ right by Gauss-Jordan elimination, without pivoting because matrix is positive definite. Zero if the
    result is not finite."""
    index = tl.arange(0, M)
    i = index[:, None]
    j = index[None, :]
    for pivot in range(M):
        line = tl.sum(tl.where(i == pivot, matrix, 0.0), 0)
        value = tl.sum(tl.where(index == pivot, right, 0.0), 0)
        factor = tl.sum(tl.where(j == pivot, matrix, 0.0), 1)
        factor = tl.where(index == pivot, 0.0, factor / tl.sum(tl.where(index == pivot, factor, 0.0), 0))
        matrix -= factor[:, None] * line[None, :]
        right -= factor * value
    gamma = right / tl.sum(tl.where(i == j, matrix, 0.0), 1)
    finite = tl.min((tl.abs(gamma) < float("inf")).to(tl.int32), 0) == 1
    return tl.where(finite, gamma, 0.0)
