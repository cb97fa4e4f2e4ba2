"""Whole heads on a GPU in every way in which they are called: replayed, compiled, on streams, threads and devices."""

import contextlib
import copy
import threading

import pytest
import torch
from gpu_heads import (  # noqa: F401
    EXACT,
    GPU,
    GRADIENT,
    STEPS,
    TOLERANCE,
    clean_fixture,
    error,
    every_backend,
    features,
    pair_fixture,
)
from torch.utils.checkpoint import checkpoint

from ifr_fast import Broyden, Implicit, backends
from ifr_fast.engine import graphs, pieces


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
