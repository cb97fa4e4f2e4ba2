"""The kernels, one module a backend, all with the functions of `plain` and its semantics.

`State` is what the solver's kernels work on; they change it in place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RUNNING = 1  # the status of a sample that still runs; if that is its last, solve.Status calls it MAX_ITER


def ridge(dtype: torch.dtype) -> float:
    """Relative Tikhonov term of Anderson's normal equations: the accuracy of inner products of dtype."""
    return torch.finfo(dtype).eps


def is_channels_last(x: Tensor) -> bool:
    """Is x (N, C, H, W) dense in channels_last, and not in the contiguous layout too?"""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the kernels keep: channels_last where x has it, else contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of x in the order of its memory."""
    return [0, 2, 3, 1] if is_channels_last(x) else list(range(x.dim()))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Some of the samples, laid out as all are."""
    order = memory_order(x)
    return x.permute(order).index_select(0, index).permute([order.index(d) for d in range(x.dim())])


def at(*tensors: Tensor | None, fill: int = 0) -> list[int]:
    """What the compiled kernels take for tensors: addresses, 0 for None, padded with zeros to `fill`."""
    found = [0 if t is None else t.data_ptr() for t in tensors]
    return found + [0] * (fill - len(found))


class State:
    """Everything a solve keeps for a chunk of n samples of `size` unknowns each.

    history (n, rows, size): the residuals g_j. gram (n, rows, rows): their inner products. p, q (n, rows, rows): the
    rule's own coefficients. step (n, rows): coefficients of the next step. norms (n, 3): ‖g‖², ‖f‖² and ‖g₀‖.
    value (like z): the best iterate; residual (n,): its relative residual. trace (evaluations, n). status, iterations
    (n,) int64; improved (n,) bool: this evaluation is the best so far.

    The inner products are summed, and the K×K algebra done, in double precision on a CPU, where it costs little, and in
    the iterate's own elsewhere.
    """

    def __init__(self, z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype) -> None:
        n, device = z.shape[0], z.device
        algebra = torch.float64 if device.type == "cpu" else z.dtype
        self.n, self.rows, self.size = n, rows, math.prod(z.shape[1:])
        self.history = torch.empty(n, rows, self.size, dtype=history_dtype, device=device)
        self.gram, self.p, self.q = (torch.zeros(n, rows, rows, dtype=algebra, device=device) for _ in range(3))
        self.step = torch.zeros(n, rows, dtype=algebra, device=device)
        self.norms = torch.zeros(n, 3, dtype=algebra, device=device)
        self.value = z.clone()
        self.residual = torch.full((n,), torch.inf, dtype=z.dtype, device=device)
        self.trace = torch.empty(evaluations, n, dtype=z.dtype, device=device)
        self.status = torch.full((n,), RUNNING, dtype=torch.int64, device=device)
        self.iterations = torch.zeros(n, dtype=torch.int64, device=device)
        self.improved = torch.zeros(n, dtype=torch.bool, device=device)
