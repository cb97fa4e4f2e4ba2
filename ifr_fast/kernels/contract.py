"""What a backend's kernels are, for those who write one and for those who call one. README.md here explains it.

A backend is a module with the functions of `Kernels`; eager.py is their specification. Kernels work on a solver's
state, which they change in place. Whatever crosses into compiled code goes through `address`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

EPS = 1e-5  # of every GroupNorm
DIVERGENCE = 1e3  # a sample is given up when its residual norm has grown by this factor

Method = Literal["broyden", "anderson", "picard"]
Convolution = Callable[[Tensor], Tensor]


class Status(IntEnum):
    """Why a sample stopped. The kernels' codes; in csrc they are those of types.h."""

    CONVERGED = 0  # ‖F(z) - z‖ ≤ rtol·‖F(z)‖
    MAX_ITER = 1  # not within max_iter steps
    DIVERGED = 2  # ‖F(z) - z‖ grew a thousandfold
    NONFINITE = 3  # F(z) or z overflowed or was NaN


RUNNING = Status.MAX_ITER.value  # a sample that still runs has this status: what it stays with if no step is left


class Norm(NamedTuple):
    """A GroupNorm: weight and bias (C,) in wide(the activations' dtype)."""

    weight: Tensor
    bias: Tensor
    groups: int


class Step(NamedTuple):
    """What a solver's step is told.

    method chooses the step from the inner products of the last `window` residuals. evaluation: how many evaluations
    came before. last: the samples are judged, and z stays. rtol: of the relative residual, ‖g‖ / ‖f‖; affine: ‖g‖ /
    ‖g₀‖ instead, as ‖f‖ of an affine f grows with the error.
    """

    method: Method
    window: int
    evaluation: int
    last: bool
    rtol: float
    affine: bool = False

    def row(self, state: SolverState) -> int:
        """The history's row for this evaluation's residual; -1 for none."""
        return -1 if self.last else self.evaluation % state.rows


def check_step(state: SolverState, step: Step) -> None:
    """ValueError where the state has no room for this step."""
    if not 0 <= step.evaluation < len(state.trace) or step.window < 1:
        room = f"the state has room for {len(state.trace)} evaluations, a window holds at least 1"
        raise ValueError(f"evaluation={step.evaluation}, window={step.window}: {room}")


class Kernels(Protocol):
    """The functions of a backend. Activations are (n, C, H, W), in any layout where CHANNELS_LAST_ONLY is False.

    consume: the result may take y's memory. state: kernels may skip samples that have stopped. params: the gradients
    of weights and biases are wanted too, of all samples; else the list of them is empty. first, second: the block's
    last two GroupNorms, second None in form="paper". shortcut: R, None in form="plain".
    """

    CHANNELS_LAST_ONLY: bool

    def convolution(self, weight: Tensor, x: Tensor) -> Convolution:
        """The 3×3 convolution of padding 1 by `weight`, ready for many tensors of x's size (n, ·, H, W)."""

    def shift(self, z: Tensor, x: Tensor, dtype: torch.dtype, state: Any) -> Tensor:
        """z + x in dtype: what F's first convolution reads."""

    def norm_relu(
        self, y: Tensor, norm: Norm, *, consume: bool = False, state: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """relu(gn(y)), of y's dtype, and the statistics mean, rstd (n, groups)."""

    def norm_relu_vjp(
        self, grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: Any = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of y, and with params those of weight and bias, given that of norm_relu's output."""

    def norm_tail(
        self,
        y: Tensor,
        shortcut: Tensor | None,
        first: Norm,
        second: Norm | None,
        *,
        consume: bool = False,
        state: Any = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The end of the block, in the wide dtype, and its norms' statistics: u = gn_first(y) + shortcut, then
        gn_second(relu(u)) where there is a second norm."""

    def norm_tail_vjp(
        self,
        grad: Tensor,
        y: Tensor,
        shortcut: Tensor | None,
        first: Norm,
        second: Norm | None,
        statistics: list[Tensor],
        *,
        params: bool,
        state: Any = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Gradients of y (its dtype) and shortcut (wide dtype; None without), and with params those of the norms'
        weights and biases, given that of norm_tail's output."""

    def tail(self, y: Tensor, shortcut: Tensor | None, first: Norm, second: Norm | None, *, state: Any = None) -> Any:
        """norm_tail's result, for `step` alone: a backend may leave its computation to the step."""

    def total(self, *addends: Tensor) -> Any:
        """The sum, for `step` alone: a backend may leave it to the step."""

    def new_state(self, z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype, from_zero: bool) -> Any:
        """A state for a solve from z (n, …); from_zero: z is zero everywhere."""

    def step(self, state: Any, f: Any, z: Tensor, step: Step) -> int | None:
        """What follows an evaluation f = F(z): the residual g = f - z joins the history, every running sample is
        judged, the method chooses its step, and z moves, in place. Returns how many samples still run; None on a
        device, where that would cost a synchronisation."""

    def finish(self, state: Any, z: Tensor) -> None:
        """Sees to state.value, the best iterates, after the last step. z may be overwritten."""


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


class SolverState:
    """A solver's state: its tensors' addresses, checked by `address` against what the constructor made."""

    n: int
    rows: int
    size: int
    history: Tensor
    trace: Tensor
    known: dict[tuple[str, ...], list[int]]

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


class State(SolverState):
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
