"""The kernels, one module a backend, all with the functions of `eager` and its semantics.

`State` is what the solver's kernels work on; they change it in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-5  # of every GroupNorm
DIVERGENCE = 1e3  # a sample whose residual norm has grown by this factor is given up
Norm = tuple[Tensor, Tensor]
Convolution = Callable[[Tensor, "State | None"], tuple[Tensor, "Tensor | None"]]
RUNNING = 1  # the status of a sample that still runs; if that is its last, solve.Status calls it MAX_ITER


def ridge(dtype: torch.dtype) -> float:
    """Relative Tikhonov term of Anderson's normal equations: the accuracy of inner products of dtype."""
    return torch.finfo(dtype).eps


def is_channels_last(x: Tensor) -> bool:
    """Is x (N, C, H, W) dense in channels_last, and not in the contiguous layout too?"""
    try:
        return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # vmap does not say
        return False


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


def address(tensor: Tensor, name: str, dtype: torch.dtype, count: int, device: torch.device) -> int:
    """Where compiled code finds the tensor's `count` numbers of dtype, side by side in memory: the one way to get it.

    ValueError, naming the tensor, what came and what was expected, where the dtype, the count or the device is another,
    where there are gaps, and where nothing is in memory (meta, fake and wrapped tensors).
    """
    try:
        if tensor.dtype is dtype and tensor.numel() == count and tensor.device == device:
            found = tensor.data_ptr()
            # Of a subclass the memory itself is asked for: a view's address is no zero even where there is none.
            plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
            there = not count or (found if plain else tensor.untyped_storage().data_ptr())
            if there and (tensor.is_contiguous() or is_channels_last(tensor)):
                return found
    except (AttributeError, RuntimeError):  # no tensor, or one that stands for others
        pass
    raise ValueError(f"{name} is {describe(tensor)}: expected {count} contiguous numbers of {dtype} on {device}")


def optional(tensor: Tensor | None, name: str, dtype: torch.dtype, count: int, device: torch.device) -> int:
    """The address of what may be left out: then 0."""
    return 0 if tensor is None else address(tensor, name, dtype, count, device)


def describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


class Checked:
    """A solver's state: its tensors' addresses, checked by `address` against what the constructor made."""

    def seal(self) -> None:
        """The end of the constructor."""
        made = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        self.device = self.history.device
        self.made = {name: (t.dtype, t.numel(), t.device) for name, t in made.items()}

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self.__dict__["known"] = {}  # addresses, no longer

    def addresses(self, names: tuple[str, ...]) -> list[int]:
        """Of these tensors, 0 where the constructor left one out; checked anew after any was replaced."""
        found = self.known.get(names)
        if found is None:
            tensors = [getattr(self, name) for name in names]
            found = self.known[names] = [
                0 if t is None and name not in self.made else address(t, f"state.{name}", *self.made[name])
                for name, t in zip(names, tensors, strict=True)
            ]
        return found


class State(Checked):
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
        self.seal()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of `dtype` are summed, and in which F and the iterates are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
