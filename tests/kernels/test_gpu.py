"""Whole heads on a GPU: against the specification in float64 on the CPU, and in every way in which they are called."""

import contextlib
import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ifr_fast import Anderson, Broyden, Implicit, Picard, Status, backends
from ifr_fast.engine import graphs, pieces

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)

GPU = torch.device("cuda", 0)
C, GROUPS, SIZE, STEPS = 32, 4, (7, 6), 8
EXACT = {"max_iter": STEPS, "rtol": 0.0}
# Of the norm of the difference over the norm, at equilibria to which 8 steps converge beyond rounding. Gradients differ
# by all of an element wherever rounding takes a ReLU's input across zero.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
GRADIENT = {torch.float32: 5e-3, torch.float16: 0.15, torch.bfloat16: 0.3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def served(name: str):
    found = backends()[name]
    return pytest.param(name, marks=pytest.mark.skipif(not found.available, reason=found.reason))


every_backend = pytest.mark.parametrize("backend", [served(name) for name in ("triton", "cuda", "eager")])


@pytest.fixture(autouse=True)
def clean(ieee_arithmetic):
    yield
    graphs.clear()
    torch.cuda.empty_cache()


@pytest.fixture
def pair(make_head):
    """A head on the GPU and the same in float64 on the CPU, by the specification. The block contracts."""

    def make(channels=C, *, groups=GROUPS, backend="auto", cuda_graphs=False, **options):
        options = {"post_gain": 0.3, "solver": Broyden(**EXACT), "adjoint": Implicit(**EXACT), **options}
        exact = make_head(channels, groups=groups, dtype=torch.float64, backend="eager", **options)
        head = make_head(channels, groups=groups, backend=backend, cuda_graphs=cuda_graphs, **options)
        head.load_state_dict(exact.state_dict())
        # float32 holds other parameters than float64: both have these.
        exact.load_state_dict(head.state_dict())
        return head.to(GPU), exact

    return make


def features(n: int, dtype: torch.dtype = torch.float32, channels: int = C, size=SIZE) -> torch.Tensor:
    x = torch.randn(n, channels, *size).to(dtype)
    return x.to(GPU, memory_format=torch.channels_last)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where actual holds one."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def leave_nan_in_free_memory():
    """What the allocator hands out next is full of NaN."""
    held = [torch.full((size,), torch.nan, device=GPU) for size in (64, 1 << 12, 1 << 16, 1 << 20, 1 << 24) * 8]
    del held


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gpu_kernels_serve_here():
    assert backends()["triton"].available, backends()["triton"].reason


@every_backend
@dtypes
@pytest.mark.parametrize("n", [0, 1, 3, 100, 257])
def test_equilibrium_and_gradients(n, dtype, backend, pair, poisoned):
    head, exact = pair(backend=backend)
    x = features(n, dtype).requires_grad_()
    grad = torch.randn_like(x)
    leave_nan_in_free_memory()
    y = head(x)
    gradients = torch.autograd.grad(y, [x, *head.parameters()], grad)
    assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if n == 0:
        return
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = exact(x64)
    assert error(y, y64) < TOLERANCE[dtype]
    expected = torch.autograd.grad(y64, [x64, *exact.parameters()], grad.cpu().double())
    names = ["x", *(name for name, _ in head.named_parameters())]
    errors = {name: error(a, e) for name, a, e in zip(names, gradients, expected, strict=True)}
    assert all(value < GRADIENT[dtype] for value in errors.values()), errors
    solution = head.last_solution
    assert (solution.iterations == STEPS).all()
    assert (solution.residual < 10 * TOLERANCE[dtype]).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", [Anderson(**EXACT), Picard(**EXACT), Broyden(1, rtol=0.0), Broyden(STEPS)], ids=str)
def test_solvers(solver, dtype, backend, pair):
    """The traces too, as far down as rounding lets them agree."""
    head, exact = pair(backend=backend, solver=solver)
    x = features(5, dtype)
    y, y64 = head(x), exact(x.cpu().double())
    stops_early = solver.rtol is None
    assert error(y, y64) < (2e-2 if stops_early else TOLERANCE[dtype])
    if stops_early:
        assert (head.last_solution.status == Status.CONVERGED).all()
        return
    trace, expected = head.last_solution.trace.double().cpu(), exact.last_solution.trace
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(trace, expected, rtol=0.05, atol=floor)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["paper", "plain"])
def test_forms(form, dtype, backend, pair):
    """Two plain steps: the paper's form has no equilibrium."""
    gain = {} if form == "paper" else {"post_gain": 0.3}
    options = {"solver": Picard(2, rtol=0.0), "adjoint": Implicit(**EXACT) if form == "plain" else "jacobianfree"}
    head, exact = pair(form=form, backend=backend, **{"post_gain": 1.0, **gain}, **options)
    x = features(4, dtype).requires_grad_()
    grad = torch.randn_like(x)
    x64 = x.detach().cpu().double().requires_grad_()
    y, y64 = head(x), exact(x64)
    assert error(y, y64) < TOLERANCE[dtype]
    actual = torch.autograd.grad(y, [x, *head.parameters()], grad)
    expected = torch.autograd.grad(y64, [x64, *exact.parameters()], grad.cpu().double())
    assert all(error(a, e) < GRADIENT[dtype] for a, e in zip(actual, expected, strict=True))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_heads_size(dtype, backend, pair):
    head, exact = pair(256, groups=32, backend=backend)
    x = features(2, dtype, 256, (14, 14))
    assert error(head(x), exact(x.cpu().double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("groups", [3, 48])
def test_odd_channel_counts(groups, pair):
    """Groups of 16, and of one channel; positions and channels that fill no block."""
    head, exact = pair(48, groups=groups)
    x = features(3, torch.float32, 48, (5, 13))
    assert error(head(x), exact(x.cpu().double())) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_maps(dtype, pair):
    """Split reductions; the reference in float64 on the GPU too, where it takes less than a minute."""
    solver = Broyden(3, rtol=0.0)
    head, exact = pair(256, groups=32, solver=solver, adjoint=Implicit(3, rtol=0.0))
    x = features(2, dtype, 256, (100, 152)).requires_grad_()
    grad = torch.randn_like(x)
    y = head(x)
    (actual,) = torch.autograd.grad(y, x, grad)
    x64 = x.detach().double().requires_grad_()
    y64 = exact.to(GPU)(x64)
    (expected,) = torch.autograd.grad(y64, x64, grad.double())
    assert error(y, y64) < 2 * TOLERANCE[dtype]
    assert error(actual, expected) < GRADIENT[dtype]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contiguous_input(dtype, backend, pair):
    head, _ = pair(backend=backend)
    x = features(3, dtype)
    y = head(x.contiguous())
    assert y.is_contiguous()
    assert error(y, head(x)) < TOLERANCE[dtype]


@every_backend
def test_a_sample_alone_gives_what_it_gives_in_a_batch(backend, pair):
    """To rounding: cuDNN may take another algorithm for another batch."""
    head, _ = pair(backend=backend)
    x = features(9).requires_grad_()
    y = head(x)
    (grads,) = torch.autograd.grad(y.square().sum(), x)
    trace = head.last_solution.trace
    for i in (0, 4, 8):
        alone = head(x[i : i + 1])
        assert error(alone[0], y[i]) < 5e-5
        torch.testing.assert_close(head.last_solution.trace[:, 0], trace[:, i], rtol=1e-2, atol=5e-6)
        (grad,) = torch.autograd.grad(alone.square().sum(), x)
        assert error(grad[i], grads[i]) < 1e-3


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_sample(dtype, backend, pair):
    head, _ = pair(backend=backend)
    x = features(6, dtype)
    bad = x.clone()
    bad[2, 0, 0, 0] = torch.nan
    results = []
    for given in (x, bad):
        given.requires_grad_()
        y = head(given)
        status = head.last_solution.status
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), given), status))
    others = [0, 1, 3, 4, 5]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[others], dirty[others])
    assert results[1][2][2] == Status.NONFINITE


@every_backend
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("rtol", [0.0, 1e-2])
def test_nothing_waits_for_the_device(rtol, cuda_graphs, backend, pair):
    options = {"solver": Broyden(STEPS, rtol=rtol), "adjoint": Implicit(STEPS, rtol=rtol)}
    head, _ = pair(backend=backend, cuda_graphs=cuda_graphs, **options)
    x = features(8, torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)

    def both() -> None:
        torch.autograd.grad(head(x), [x, *head.parameters()], grad)

    for _ in range(3):
        both()
    with no_synchronisation():
        both()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_varying_size_replay(dtype, backend, pair):
    head, _ = pair(backend=backend, cuda_graphs=True)
    eager = copy.deepcopy(head)
    eager.cuda_graphs = False
    kept = []
    for n in (97, 98, 100, 99, 97, 100):
        x = features(n, dtype).requires_grad_()
        grad = torch.randn_like(x)
        y, expected = head(x), eager(x)
        assert error(y, expected) < TOLERANCE[dtype]
        traces = head.last_solution.trace, eager.last_solution.trace
        torch.testing.assert_close(*traces, rtol=0.1, atol=1e-5 if dtype == torch.float32 else 1e-2)
        for a, e in zip(
            torch.autograd.grad(y, [x, *head.parameters()], grad),
            torch.autograd.grad(expected, [x, *eager.parameters()], grad),
            strict=True,
        ):
            assert error(a, e) < GRADIENT[dtype]
        kept.append((y.detach(), y.detach().clone()))
    assert all(torch.equal(y, copied) for y, copied in kept)  # no replay wrote over another's result
    assert any(recording.pieces for recording in graphs._recordings.values())


@every_backend
@pytest.mark.parametrize("options", [{}, {"workspace": 1 << 20}, {"history_dtype": "float8_e5m2"}], ids=str)
@pytest.mark.parametrize("steps", [15, 8], ids="{} steps".format)
def test_replays_end_early_with_the_same_results(steps, options, backend, pair):
    """Batches of which none, all, few or many samples are slow; by conditional nodes where this build has them. Not all
    samples converge within 8 steps."""
    options = {"max_iter": steps, "rtol": 1e-3, **options}
    options = {"solver": Broyden(**options), "adjoint": Implicit(**options)}
    head, _ = pair(backend=backend, cuda_graphs=True, **options)
    eager = copy.deepcopy(head)
    eager.cuda_graphs = False
    n = 40
    for slow in (0, n, 5, n // 2, n // 2 + 1, 0, n):
        x = features(n)
        x[slow:] = 0
        x.requires_grad_()
        y, expected = head(x), eager(x)
        assert error(y, expected) < TOLERANCE[torch.float32]
        for name in ("iterations", "status"):
            actual, wanted = (getattr(h.last_solution, name) for h in (head, eager))
            assert (actual != wanted).float().mean() < 0.1, name  # rounding may decide at the tolerance
        assert error(*(h.last_solution.trace.nan_to_num() for h in (head, eager))) < 1e-2
        grad = torch.randn_like(x)
        actual, wanted = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        assert error(actual, wanted) < GRADIENT[torch.float32]


@pytest.mark.skipif(not backends()["cuda"].available, reason=backends()["cuda"].reason)
def test_recordings_have_conditional_nodes(pair):
    """Where the extension and the driver have them, nothing falls back."""
    head, _ = pair(cuda_graphs=True, solver=Broyden(15))
    for _ in range(3):
        head(features(4))
    assert pieces.conditional_nodes() is not None
    assert pieces._refused == []
    assert all(len(r.pieces) == 1 for r in graphs._recordings.values())


def test_replays_take_no_more_memory(pair):
    head, _ = pair(cuda_graphs=True)
    x = features(8, torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)

    def used() -> tuple[int, int]:
        torch.autograd.grad(head(x), [x, *head.parameters()], grad)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _ in range(4):
        before = used()
    for _ in range(50):
        after = used()
    assert after == before


def test_graphs_on_a_thread_that_comes_later(pair):
    head, _ = pair(cuda_graphs=True)
    x, found = features(4), []

    def run():
        with torch.no_grad():
            found.extend(head(x) for _ in range(3))

    run()
    graphs.clear()
    with torch.no_grad():
        head(x)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 6
    assert all(error(y, found[0]) < 1e-5 for y in found)


def test_graphs_under_activation_checkpointing(pair):
    """The recomputation calls the head on autograd's own thread."""
    head, _ = pair(cuda_graphs=True)
    x = features(4).requires_grad_()
    (expected,) = torch.autograd.grad(head(x).sum(), x)
    graphs.clear()
    for _ in range(4):
        (grad,) = torch.autograd.grad(checkpoint(head, x, use_reentrant=False).sum(), x)
        assert error(grad, expected) < GRADIENT[torch.float32]


def test_graphs_in_inference_mode_then_in_training(pair):
    head, _ = pair(cuda_graphs=True)
    x = features(4)
    with torch.inference_mode():
        expected = [head(x) for _ in range(3)][-1].clone()
    x.requires_grad_()
    y = head(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert error(y, expected) < 1e-5
    assert grad.isfinite().all()


@every_backend
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_side_stream(cuda_graphs, backend, pair):
    head, _ = pair(backend=backend, cuda_graphs=cuda_graphs)
    inputs = [features(6) for _ in range(4)]
    expected = [head(x).clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work ahead of the solves on their stream alone: kernels on another one would read before it is done.
        delayed = [x * 0 for x in inputs]
        torch.cuda._sleep(20_000_000)
        for late, x in zip(delayed, inputs, strict=True):
            late.copy_(x)
        outputs = [head(x) for x in delayed]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(error(y, e) < 1e-5 for y, e in zip(outputs, expected, strict=True))


@every_backend
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_inside_a_users_own_graph(cuda_graphs, backend, pair):
    head, _ = pair(backend=backend, cuda_graphs=cuda_graphs)
    x = features(6, torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                head(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = head(x)
        for _ in range(3):
            x.copy_(features(6, torch.bfloat16))
            graph.replay()
            assert error(y, head(x)) < 1e-3


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiles_whole(cuda_graphs, pair):
    torch._dynamo.reset()
    head, _ = pair(cuda_graphs=cuda_graphs)
    x = features(4, torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    compiled = torch.compile(head, fullgraph=True)
    for _ in range(3):
        y, expected = compiled(x), head(x)
        inputs = [x, *head.parameters()]
        actual, wanted = (torch.autograd.grad(out, inputs, grad) for out in (y, expected))
    assert error(y, expected) < TOLERANCE[torch.bfloat16]
    assert all(error(a, w) < GRADIENT[torch.bfloat16] for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, pair):
    head, exact = pair()
    x = features(4).requires_grad_()
    with torch.autocast("cuda", dtype):
        y = head(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = exact(x64)
    (expected,) = torch.autograd.grad(y64.square().sum(), x64)
    assert y.dtype == torch.float32
    assert 2e-5 < error(y, y64) < TOLERANCE[dtype]  # and not computed in float32
    assert error(grad, expected) < GRADIENT[dtype]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
@every_backend
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_second_device(cuda_graphs, backend, pair):
    head, _ = pair(backend=backend, cuda_graphs=cuda_graphs)
    x = features(4)
    expected = head(x)
    other = torch.device("cuda", 1)
    moved = copy.deepcopy(head).to(other)
    for _ in range(3):
        given = x.to(other).requires_grad_()
        y = moved(given)
        (grad,) = torch.autograd.grad(y.sum(), given)
        assert y.device == grad.device == other
        assert error(y, expected) < 1e-5
        assert grad.isfinite().all()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backward", [False, True])
def test_workspace_does_not_grow_with_the_batch(backward, pair):
    """Peak memory beyond inputs and results, where either batch takes several chunks."""
    workspace = {**EXACT, "workspace": 16 << 20}
    head, _ = pair(64, solver=Broyden(**workspace), adjoint=Implicit(**workspace))

    def extra(n: int) -> int:
        x = features(n, torch.bfloat16, 64, (14, 14)).requires_grad_(backward)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = head(x)
        if backward:
            y.backward(x.detach())
        results = (4 if backward else 2) * x.nbytes  # with copies for autograd and in head.last_solution
        return torch.cuda.max_memory_allocated() - before - results

    extra(32)  # weights' copies and libraries' workspaces
    small, large = extra(128), extra(512)
    assert large < 1.25 * max(small, 16 << 20)
