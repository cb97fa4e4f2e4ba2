"""The contract between a backend's kernels and their callers. README.md in this folder explains it.

A backend is a module with the functions of `Kernels`; eager.py is their specification. Kernels change a solver's state
in place. Every address that compiled code receives comes from `address`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

EPS = 1e-5  # the ε of every GroupNorm
DIVERGENCE = 1e3  # a sample is given up when its residual norm has grown by this factor

Method = Literal["broyden", "anderson", "picard"]
Convolution = Callable[[Any], Any]  # of a tensor, or of what a backend has not computed yet


class Status(IntEnum):
    """Why a sample stopped. The kernels use these codes; csrc/types.h has the same."""

    CONVERGED = 0  # ‖F(z) - z‖ ≤ rtol·‖F(z)‖
    MAX_ITER = 1  # not converged within max_iter steps
    DIVERGED = 2  # ‖F(z) - z‖ grew a thousandfold
    NONFINITE = 3  # F(z) or z overflowed or was NaN


# A sample that still runs has this status, which is the right one if no step is left.
RUNNING = Status.MAX_ITER.value


class Norm(NamedTuple):
    """A GroupNorm: weight and bias (C,) in wide(the activations' dtype)."""

    weight: Tensor
    bias: Tensor
    groups: int


class Step(NamedTuple):
    """The parameters of one step of a solver.

    method: chooses the step from the inner products of the last `window` residuals. evaluation: how many evaluations
    came before. last: judge the samples, but do not move z. rtol: of the relative residual ‖g‖ / ‖f‖. affine: use ‖g‖ /
    ‖g₀‖ instead, because ‖f‖ of an affine f grows with the error.
    """

    method: Method
    window: int
    evaluation: int
    last: bool
    rtol: float
    affine: bool = False

    def row(self, state: SolverState) -> int:
        """The history's row for this evaluation's residual; -1 in the last step, which stores none."""
        return -1 if self.last else self.evaluation % state.rows


def check_step(state: SolverState, step: Step) -> None:
    """Raises ValueError if the state has no room for this step."""
    if step.method not in get_args(Method):
        raise ValueError(f"method={step.method!r}: expected one of {', '.join(get_args(Method))}")
    if not 0 <= step.evaluation < len(state.trace) or step.window < 1:
        room = f"the state has room for {len(state.trace)} evaluations, a window holds at least 1"
        raise ValueError(f"evaluation={step.evaluation}, window={step.window}: {room}")


class Kernels(Protocol):
    """The functions of a backend. Activations are (n, C, H, W), in any layout unless CHANNELS_LAST_ONLY.

    consume: the result may take y's memory. state: the solve's, if the result is for its step. Kernels may then skip
    samples that have stopped, and leave a computation to the convolution or the step that reads its result (Any).
    params: return the gradients of weights and biases too, summed over all samples; otherwise their list is empty.
    first, second: the block's last two GroupNorms; second is None for form="paper". shortcut: R; None for form="plain".
    """

    CHANNELS_LAST_ONLY: bool
    SKIPS_STOPPED: bool  # whether a sample that has stopped costs nothing more within a solve
    BUFFERS: tuple[int, int]  # activations of C and of mid_channels that an evaluation holds beside z and X

    def convolution(self, weight: Tensor, x: Tensor, *, transposed: bool = False) -> Convolution:
        """The 3×3 convolution with padding 1 by `weight` (out, in, 3, 3), prepared for many tensors of x's size (n, ·,
        H, W) and layout. transposed: its gradient in its input instead."""

    def shift(self, z: Tensor, x: Tensor, dtype: torch.dtype, state: Any) -> Any:
        """z + x in dtype: the input of F's first convolution."""

    def norm_relu(self, y: Any, norm: Norm, *, consume: bool = False, state: Any = None) -> tuple[Any, list[Tensor]]:
        """relu(gn(y)) in y's dtype, and the statistics mean and rstd (n, groups)."""

    def norm_relu_vjp(
        self, grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: Any = None
    ) -> tuple[Any, list[Tensor]]:
        """From the gradient of norm_relu's output: that of y and, with params, those of weight and bias."""

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
        """The end of the block, in the wide dtype, and its norms' statistics. It is u = gn_first(y) + shortcut or, if
        there is a second norm, gn_second(relu(u))."""

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
    ) -> tuple[Any, Tensor | None, list[Tensor]]:
        """From the gradient of norm_tail's output: those of y (in y's dtype), of shortcut (in the wide dtype; None
        without one) and, with params, of the norms' weights and biases."""

    def tail(self, y: Any, shortcut: Any, first: Norm, second: Norm | None, *, state: Any = None) -> Any:
        """norm_tail's result, for `step` alone: a backend may leave the computation to the step."""

    def total(self, *addends: Tensor) -> Any:
        """The sum, for `step` alone: a backend may leave the computation to the step."""

    def new_state(self, z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype, from_zero: bool) -> Any:
        """The state of a solve that starts at z (n, …). from_zero: z is zero everywhere."""

    def step(self, state: Any, f: Any, z: Tensor, step: Step) -> int | None:
        """Processes an evaluation f = F(z): the residual g = f - z joins the history, every running sample is judged,
        the method chooses its step, and z moves, in place. Returns how many samples still run; None on a GPU, where
        counting would cost a synchronisation."""

    def finish(self, state: Any, z: Tensor) -> None:
        """Sets state.value, the best iterates, after the last step. z may be overwritten."""


def ridge(dtype: torch.dtype) -> float:
    """The relative Tikhonov term of Anderson's normal equations: the accuracy of inner products in dtype."""
    return torch.finfo(dtype).eps


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) is dense in channels_last, and not contiguous as well."""
    try:
        return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # vmap does not tell
        return False


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the kernels keep: channels_last if x has it, else contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of x in the order of its memory."""
    return [0, 2, 3, 1] if is_channels_last(x) else list(range(x.dim()))


def pick(x: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """The samples of x at `index`, in x's memory layout. They are counted by dimension `dim`."""
    order = memory_order(x)
    picked = _copyable(x).permute(order).index_select(dim, index).view(x.dtype)
    return picked.permute([order.index(d) for d in range(x.dim())])


def put(x: Tensor, index: Tensor, samples: Tensor, dim: int = 0) -> None:
    """Writes the samples that `pick` gave back to x."""
    order = memory_order(x)
    _copyable(x).permute(order).index_copy_(dim, index, _copyable(samples).permute(order))


def _copyable(x: Tensor) -> Tensor:
    """x, or its bytes: torch cannot copy numbers of 8 bits by an index."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def address(tensor: Tensor, name: str, dtype: torch.dtype, count: int, device: torch.device) -> int:
    """The address at which compiled code finds the tensor's `count` numbers of dtype, side by side in memory. No other
    function gives addresses to compiled code.

    Raises ValueError if the dtype, the count or the device is another, if there are gaps, and if nothing is in memory
    (meta, fake and wrapped tensors). It names the tensor, what was given and what was expected.
    """
    try:
        if tensor.dtype is dtype and tensor.numel() == count and tensor.device == device:
            found = tensor.data_ptr()
            # A tensor subclass may have no memory. A view into it has a nonzero data_ptr() even then: ask its storage.
            plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
            there = not count or (found if plain else tensor.untyped_storage().data_ptr())
            if there and (tensor.is_contiguous() or is_channels_last(tensor)):
                return found
    except (AttributeError, RuntimeError):  # not a tensor, or one without a storage of its own
        pass
    raise ValueError(f"{name} is {describe(tensor)}: expected {count} contiguous numbers of {dtype} on {device}")


def optional(tensor: Tensor | None, name: str, dtype: torch.dtype, count: int, device: torch.device) -> int:
    """The address of a tensor that may be left out; 0 for None."""
    return 0 if tensor is None else address(tensor, name, dtype, count, device)


def describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def new_scales(z: Tensor, rows: int, history_dtype: torch.dtype) -> Tensor | None:
    """The scales (n, rows) of a history in 8 bits, all 1; None for a wider one, whose rows have none."""
    return torch.ones(len(z), rows, dtype=z.dtype, device=z.device) if history_dtype.itemsize == 1 else None


class SolverState:
    """Base of a solver's states. Gives the addresses of its tensors, checked against what the constructor made.

    A tensor may be replaced by assignment, but not resized or moved (`resize_`, `set_`): its address is remembered.
    """

    n: int
    rows: int
    size: int
    history: Tensor
    scales: Tensor | None
    p: Tensor
    q: Tensor
    trace: Tensor
    known: dict[tuple[str, ...], list[int]]

    def seal(self) -> None:
        """Notes each tensor's dtype, size and device. The constructor calls it last."""
        made = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        self.device = self.history.device
        self.made = {name: (t.dtype, t.numel(), t.device) for name, t in made.items()}

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self.__dict__["known"] = {}  # forgets the addresses, which may have changed

    def addresses(self, names: tuple[str, ...]) -> list[int]:
        """These tensors' addresses; 0 if the constructor left one out. Checked again after one was replaced."""
        found = self.known.get(names)
        if found is None:
            tensors = [getattr(self, name) for name in names]
            found = self.known[names] = [
                0 if t is None and name not in self.made else address(t, f"state.{name}", *self.made[name])
                for name, t in zip(names, tensors, strict=True)
            ]
        return found

    def select(self, z: Tensor, index: Tensor) -> tuple[Any, Tensor]:
        """The state and the iterate of the samples at `index` alone. What kernels have added since stays behind."""
        some, z_some = copy(self), pick(z, index)
        some.n = len(index)
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                made = name in self.made
                setattr(some, name, z_some if tensor is z else pick(tensor, index, _samples(name)) if made else None)
        some.seal()
        return some, z_some

    def rejoin(self, z: Tensor, some: SolverState, z_some: Tensor, index: Tensor) -> None:
        """Takes over what the samples at `index`, selected before, have become."""
        put(z, index, z_some)
        for name in self.made:
            tensor = getattr(self, name)
            if tensor is not z:
                put(tensor, index, getattr(some, name), _samples(name))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """p and q as coefficients of the history's rows as they are stored, without their scales."""
        if self.scales is None:
            return self.p, self.q
        scales = self.scales.unsqueeze(1)
        return self.p * scales, self.q * scales


def _samples(name: str) -> int:
    """The dimension that counts samples in the state's tensor of this name."""
    return 1 if name == "trace" else 0


class State(SolverState):
    """Everything that a solve keeps for a chunk of n samples of `size` unknowns each.

    history (n, rows, size): the residuals g_j. scales (n, rows): of a history in 8 bits, g_j is scale_j times row j;
    else None. gram (n, rows, rows): the inner products. p, q (n, rows, rows): the method's own coefficients. step (n,
    rows): coefficients of the next step. norms (n, 3): ‖g‖², ‖f‖² and ‖g₀‖. value (like z): the best iterate. residual
    (n,): its relative residual. trace (evaluations, n): all relative residuals. status, iterations (n,) int64. improved
    (n,) bool: whether this evaluation is the best so far.

    On a CPU the inner products are summed, and the K×K algebra is done, in float64, which costs little there. Elsewhere
    both are in the iterate's own dtype.
    """

    def __init__(self, z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype) -> None:
        n, device = z.shape[0], z.device
        algebra = torch.float64 if device.type == "cpu" else z.dtype
        self.n, self.rows, self.size = n, rows, math.prod(z.shape[1:])
        self.history = torch.empty(n, rows, self.size, dtype=history_dtype, device=device)
        self.scales = new_scales(z, rows, history_dtype)
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
