"""What speed.py compares: the convolution stack, IFR by every solver, the released solver, torchdeq.

All but the stacks and the rows with fewer channels inside evaluate the same block, of the same initial weights.
`contenders` are compared on every device, `gpu_contenders` on GPUs too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.timing.measure import Call
from benchmarks.timing.winograd import WinogradStack
from ifr_fast import Anderson, Broyden, IFRHead, Implicit, Picard, Unroll, backends, reference
from ifr_fast.diagnostics import spectral_radius
from ifr_fast.kernels import choose
from ifr_fast.kernels.convolutions import MULTIPLE
from ifr_fast.solvers import Solver

BASE = "4 convolutions, NCHW"
IFR = "IFR Broyden"
BF16_HISTORY = "IFR Broyden, bf16 history"
IFR_DIRECT = "IFR Broyden, direct convolutions"
RELEASED = "as released (Broyden)"
TORCHDEQ, TORCHDEQ_ANDERSON = "torchdeq Broyden", "torchdeq Anderson"
WINOGRAD_STACK = "4 convolutions, NHWC, by Winograd"
BF16_STACK = "4 convolutions, NHWC, bf16"
COMPILED_STACK = "4 convolutions, NHWC, bf16, compiled"
BF16 = "IFR Broyden, NHWC, bf16"
GRAPH = "IFR Broyden, NHWC, bf16, graph"
CONVERGED = "IFR Broyden to 1e-2, NHWC, bf16, graph"
EARLY = "IFR Broyden, stopping early, NHWC, bf16, graph"
QUARTER = "IFR Broyden, C/4 inside, 7 steps"
QUARTER_BF16 = f"{QUARTER}, NHWC, bf16"
TORCHDEQ_BF16 = "torchdeq Broyden, NHWC, bf16"

# Eight evaluations of two convolutions, each of a quarter of a C to C one's arithmetic: what four of those cost.
QUARTER_STEPS = {"max_iter": 7, "rtol": 0}

REPLAYED = "replays a CUDA graph, whose memory pool is not in extra MiB"
LOOSE = 1e-2  # the relative residual to which CONVERGED and EARLY solve


@dataclass(frozen=True)
class Contender:
    """A row: what it is called, how its calls are made, what it takes in.

    forward(x) gives a call that returns y; backward(x, cotangent) one that returns y and the gradients of x and the
    parameters. x: (N, C, H, W) of this dtype and layout. residual(x, y): each sample's relative residual at y, (N,),
    where something is solved; by the specification in float32, whatever dtype the row computes in. in_sweep: the row is
    timed for every N, not only in the table; in_short: in the short form too. compiled: the first call compiles. graph:
    on a GPU the first call runs eagerly, the second is recorded, later ones replay. note: what a reader of the row must
    know. unavailable: why there are no calls.
    """

    name: str
    forward: Callable[[Tensor], Call] | None = None
    backward: Callable[[Tensor, Tensor], Call] | None = None
    residual: Callable[[Tensor, Tensor], Tensor] | None = None
    parameters: int = 0
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    in_sweep: bool = False
    in_short: bool = False
    compiled: bool = False
    graph: bool = False
    note: str = ""
    unavailable: str = ""


@dataclass(frozen=True)
class Setting:
    """channels: C. steps: of every solver. seed: of all weights."""

    channels: int
    steps: int
    seed: int
    device: torch.device

    @property
    def groups(self) -> int:
        return math.gcd(self.channels, 32)

    @property
    def quarter(self) -> dict[str, int]:
        """A head's option for a quarter of the channels inside the block."""
        return {"mid_channels": max(1, self.channels // 4)}

    def head(self, **options) -> IFRHead:
        torch.manual_seed(self.seed)
        groups = math.gcd(self.groups, options.get("mid_channels", self.channels))
        return IFRHead(self.channels, groups=groups, **options).to(self.device)

    def stack(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        c = self.channels
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(c, c, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*layers).to(self.device)


def contenders(setting: Setting) -> list[Contender]:
    """All rows, the base of the ratios first."""
    steps = setting.steps
    bf16, channels_last = torch.bfloat16, torch.channels_last
    narrow = {"dtype": bf16, "layout": channels_last}
    exact = {"max_iter": steps, "rtol": 0}
    stored = {**exact, "history_dtype": bf16}
    quarter = Broyden(**QUARTER_STEPS), QUARTER_STEPS, setting.quarter
    params = [t.detach().requires_grad_() for t in setting.head().block.tensors()]
    block = partial(reference.residual_block, params=params, groups=setting.groups)
    wide = setting.stack().to(memory_format=channels_last)
    ifr = partial(by_ifr, setting)
    unroll = setting.head(solver=Unroll(4))
    on_cpu = setting.device.type == "cpu"

    return [
        of_module(BASE, setting.stack(), in_sweep=True, in_short=True),
        of_module("4 convolutions, NHWC", wide, layout=channels_last),
        *([winograd_stack(setting)] if on_cpu else []),
        of_module("4 convolutions, compiled", torch.compile(setting.stack(), dynamic=False), compiled=True),
        of_module(BF16_STACK, narrow_stack(setting), in_sweep=True, in_short=True, **narrow),
        of_module("unroll of 4", unroll, residual=partial(block_residual, specified(unroll))),
        ifr(IFR, Broyden(**exact), exact, in_sweep=True),
        *([ifr(IFR_DIRECT, Broyden(**exact), exact, {"convolution": "direct"}, in_sweep=True)] if on_cpu else []),
        ifr(BF16_HISTORY, Broyden(**stored), stored),
        ifr("IFR Anderson", Anderson(**exact), exact),
        ifr("IFR Picard", Picard(**exact), exact),
        ifr(QUARTER, *quarter, in_sweep=True),
        ifr(BF16, Broyden(**exact), exact, in_sweep=True, in_short=True, **narrow),
        ifr(QUARTER_BF16, *quarter, **narrow),
        Contender(
            RELEASED,
            partial(released, block, steps),
            partial(released_gradients, block, params, steps),
            partial(block_residual, block),
            count(params),
            in_sweep=True,
            in_short=True,
        ),
        # torchdeq counts Broyden's steps but Anderson's evaluations, of which there is one more.
        by_torchdeq(TORCHDEQ, steps, block, params),
        by_torchdeq(TORCHDEQ_ANDERSON, steps + 1, block, params),
    ]


def gpu_contenders(setting: Setting, features: Tensor) -> list[Contender]:
    """The rows that only a GPU has. features: X, (N, C, H, W) float32, on which EARLY's block is calibrated."""
    exact, loose = {"max_iter": setting.steps, "rtol": 0}, {"max_iter": setting.steps, "rtol": LOOSE}
    broyden = Broyden(**exact)
    narrow = {"dtype": torch.bfloat16, "layout": torch.channels_last}
    auto = choose.kernels("auto", setting.device.type, torch.bfloat16).__name__.rpartition(".")[2]
    replayed = {"graph": True, "note": f"{auto} kernels; {REPLAYED}"}
    compiled = torch.compile(narrow_stack(setting), dynamic=False)

    def by_backend(backend: str, graph: bool = True, history: torch.dtype = torch.bfloat16) -> Contender:
        kernels = f"8-bit history, {backend}" if history.itemsize == 1 else f"{backend} kernels"
        name = f"IFR Broyden, {kernels}, NHWC, bf16" + (", graph" if graph else "")
        try:
            choose.kernels(backend, setting.device.type, torch.bfloat16, history)
        except ValueError as error:
            return Contender(name, unavailable=str(error), in_short=True)
        options, stored = {"backend": backend, "cuda_graphs": graph}, {**exact, "history_dtype": history}
        fields = {"in_short": True, **narrow, "graph": graph, "note": REPLAYED if graph else ""}
        return by_ifr(setting, name, Broyden(**stored), stored, options, **fields)

    head = setting.head()
    params = [t.detach().to(torch.bfloat16) for t in head.block.tensors()]
    params = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in params]
    params = [t.requires_grad_() for t in params]
    block = partial(reference.residual_block, params=params, groups=setting.groups)
    residual = partial(block_residual, specified(head))
    graphs = {"cuda_graphs": True}
    anderson = Anderson(**exact)
    quarter = Broyden(**QUARTER_STEPS), QUARTER_STEPS, {**graphs, **setting.quarter}
    return [
        of_module(COMPILED_STACK, compiled, compiled=True, **narrow),
        by_ifr(setting, GRAPH, broyden, exact, graphs, in_sweep=True, in_short=True, **narrow, **replayed),
        by_ifr(setting, CONVERGED, Broyden(**loose), loose, graphs, in_short=True, **narrow, **replayed),
        by_ifr(setting, "IFR Anderson, NHWC, bf16, graph", anderson, exact, graphs, **narrow, **replayed),
        by_ifr(setting, f"{QUARTER_BF16}, graph", *quarter, **narrow, **replayed),
        *(by_backend(name, graph) for name in ("triton", "cuda", "eager") for graph in (True, False)),
        *(by_backend(name, history=torch.float8_e5m2) for name in ("triton", "cuda")),
        by_ifr(setting, "IFR Broyden, graph", broyden, exact, graphs, **replayed),
        stopping_early(setting, features, **narrow),
        by_torchdeq(TORCHDEQ_BF16, setting.steps, block, params, residual=residual, **narrow),
    ]


def stopping_early(setting: Setting, features: Tensor, **fields) -> Contender:
    """A block of spectral radius 0.6, solved to LOOSE: samples stop at different steps."""
    try:
        gain, radii = calibrated(setting, features, radius=0.6)
    except Exception as error:
        return Contender(EARLY, unavailable=f"calibration failed: {type(error).__name__}: {error}", in_short=True)
    loose = {"max_iter": setting.steps, "rtol": LOOSE}
    radius = f"{radii.median():.2f} ({radii.min():.2f}–{radii.max():.2f})"
    note = f"GN3's gain {gain:.3g} gives the spectral radius {radius}; stops at {LOOSE:.0e}"
    options = {"post_gain": gain, "cuda_graphs": True}
    fields = {"graph": True, "note": f"{note}; {REPLAYED}", "in_short": True, **fields}
    return by_ifr(setting, EARLY, Broyden(**loose), loose, options, **fields)


def calibrated(setting: Setting, features: Tensor, radius: float) -> tuple[float, Tensor]:
    """GN3's gain at which the median of the spectral radii of ∂F/∂z at the equilibria for these features is `radius`,
    by bisection; and the radii of the samples there, (N,)."""
    head = setting.head(solver=Broyden(max_iter=40, rtol=1e-4))
    low, high = 0.0, 2.0
    for _ in range(12):
        gain = (low + high) / 2
        with torch.no_grad():
            head.block.gn3.weight.fill_(gain)
        radii = spectral_radius(head, features)
        low, high = (low, gain) if radii.median() > radius else (gain, high)
    return gain, radii.cpu()


def winograd_stack(setting: Setting) -> Contender:
    """What IFR's convolutions do for the stack, whose weights they transform once."""
    backend, channels_last = backends()["cpu"], torch.channels_last
    if not backend.available or setting.channels % MULTIPLE:
        why = backend.reason if not backend.available else f"{setting.channels} channels are no multiple of {MULTIPLE}"
        return Contender(WINOGRAD_STACK, unavailable=why)
    return of_module(WINOGRAD_STACK, WinogradStack(setting.stack()), layout=channels_last, in_sweep=True)


def narrow_stack(setting: Setting) -> nn.Module:
    return setting.stack().to(dtype=torch.bfloat16, memory_format=torch.channels_last)


def by_ifr(
    setting: Setting, name: str, solver: Solver, adjoint: dict, options: dict | None = None, **fields
) -> Contender:
    """The row of an IFRHead of these options; adjoint: Implicit's."""
    head = setting.head(solver=solver, adjoint=Implicit(**adjoint), **(options or {}))
    return of_module(name, head, residual=partial(block_residual, specified(head)), **fields)


def count(tensors) -> int:
    return sum(t.numel() for t in tensors)


def of_module(name: str, module: nn.Module, **fields) -> Contender:
    """The row of a module (N, C, H, W) → the same."""

    def backward(x: Tensor, cotangent: Tensor) -> Call:
        def call() -> tuple[Tensor, tuple[Tensor, ...]]:
            y = module(x)
            return y.detach(), torch.autograd.grad(y, [x, *module.parameters()], cotangent)

        return call

    return Contender(name, partial(bind, module), backward, parameters=count(module.parameters()), **fields)


def bind(module: nn.Module, x: Tensor) -> Call:
    return torch.no_grad()(partial(module, x))


def specified(head: IFRHead) -> Callable[..., Tensor]:
    """F(z, X) by the specification, of the head's own parameters."""
    params = [t.detach() for t in head.block.tensors()]
    return partial(reference.residual_block, params=params, groups=head.block.groups)


@torch.no_grad()
def block_residual(block: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(N,) float32, without TF32: the residuals of solves in other precisions are told apart by it."""
    x, y = x.float(), y.float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return reference.relative_residual(y, block(y, x) - y)


def released(block: Callable[..., Tensor], steps: int, x: Tensor) -> Call:
    """The solver as published, its weights computed once."""

    @torch.no_grad()
    def call() -> Tensor:
        return reference.broyden(lambda z: block(z, x), torch.zeros_like(x), steps=steps)[0]

    return call


def released_gradients(
    block: Callable[..., Tensor], params: list[Tensor], steps: int, x: Tensor, cotangent: Tensor
) -> Call:
    """As published: Eq. 8 by the same solver, on autograd's vjp of one evaluation of F at the equilibrium."""
    solve = released(block, steps, x)

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        z = solve().requires_grad_()
        value = block(z, x)

        def adjoint(w: Tensor) -> Tensor:
            return torch.autograd.grad(value, z, w, retain_graph=True)[0] + cotangent

        w, *_ = reference.broyden(adjoint, torch.zeros_like(z), steps=steps)
        return z.detach(), torch.autograd.grad(value, [x, *params], w)

    return call


def by_torchdeq(name: str, iterations: int, block: Callable[..., Tensor], params: list[Tensor], **fields) -> Contender:
    """The solver that the name's second word names, on the same block; its tolerance is 0, so that the steps are as
    many. Gradients by its IFT."""
    solver = name.split()[1].strip(",").lower()
    try:
        from torchdeq import get_deq
    except ImportError as error:
        return Contender(name, unavailable=f"not installed: pip install torchdeq ({error})")
    options = {
        key: value
        for side in "fb"
        for key, value in (
            (f"{side}_solver", solver),
            (f"{side}_max_iter", iterations),
            (f"{side}_tol", 0.0),
            (f"{side}_stop_mode", "rel"),
        )
    }
    solving, training = get_deq(ift=True, **options).eval(), get_deq(ift=True, **options).train()

    def forward(x: Tensor) -> Call:
        @torch.no_grad()
        def call() -> Tensor:
            return solving(lambda z: block(z, x), torch.zeros_like(x))[0][-1]

        return call

    def backward(x: Tensor, cotangent: Tensor) -> Call:
        def call() -> tuple[Tensor, tuple[Tensor, ...]]:
            y = training(lambda z: block(z, x), torch.zeros_like(x))[0][-1]
            return y.detach(), torch.autograd.grad(y, [x, *params], cotangent)

        return call

    fields = {"residual": partial(block_residual, block), **fields}
    return Contender(name, forward, backward, parameters=count(params), **fields)
