"""Recording and replaying, without a GPU: a replay is the recorded function run again on the recording's buffers."""

import gc
import itertools
import threading

import pytest
import torch

from ifr_fast import Broyden, JacobianFree
from ifr_fast.engine import graphs
from ifr_fast.engine.pieces import Piece


@pytest.fixture
def recorded(monkeypatch):
    """Recording works on this device; the list counts the recordings."""
    captures = []

    class Pool:
        def __init__(self):
            self.number = next(numbers)

    numbers = itertools.count()

    def record(function, pool):
        captures.append(pool.number)
        results = [r.clone() for r in function()]

        def replay():
            for kept, new in zip(results, function(), strict=True):
                kept.copy_(new)

        return [Piece(replay, False, None)], results

    monkeypatch.setattr(graphs, "Pool", Pool)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "current_stream", lambda device: device)
    monkeypatch.setattr(graphs, "usable", lambda x: len(x) > 0)
    graphs.clear()
    yield captures
    graphs.clear()


def test_buckets():
    buckets = [graphs.bucket(n) for n in range(1, 1025)]
    assert all(n <= b <= (1 + 1 / 16) * n for n, b in enumerate(buckets, 1))
    assert len(set(buckets)) == 16 * 7
    assert [graphs.bucket(n) for n in (1, 8, 64, 86, 100, 256, 257, 512)] == [1, 8, 64, 88, 100, 256, 272, 512]


def test_a_detectors_batches_fit_the_recordings(recorded):
    """Forward and backward of every number of RoIs up to 512, met twice: each is recorded once, and none again."""
    for _ in range(3):
        for n in range(1, 513):
            for direction in ("forward", "backward"):
                graphs.run(lambda batch, _: [batch[0]], direction, [torch.ones(n)], [], dims=[0])
    assert len(recorded) == graphs.LIMIT == len(graphs._recordings)


@pytest.mark.parametrize("channels_last", [False, True])
def test_varying_batches_replay_one_recording(recorded, make_head, channels_last):
    head = make_head(8, groups=2, solver=Broyden(4, rtol=0.0))
    plain = make_head(8, groups=2, solver=Broyden(4, rtol=0.0))
    plain.load_state_dict(head.state_dict())
    head.cuda_graphs = True
    outputs = []
    for n in (97, 98, 100, 99, 97):
        x = torch.randn(n, 8, 3, 5)
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        grad = torch.randn_like(x)
        y = head(x)
        outputs.append((y, y.detach().clone(), head.last_solution.trace, head.last_solution.trace.clone()))
        expected = plain(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(head.last_solution.trace, plain.last_solution.trace)
        inputs = [[x, *h.parameters()] for h in (head, plain)]
        grads = [torch.autograd.grad(out, i, grad) for out, i in zip((y, expected), inputs, strict=True)]
        for a, b in zip(*grads, strict=True):  # by norms: the padded batch's convolutions round otherwise
            assert (a - b).norm() <= 1e-4 * (b.norm() + 1)
    assert len(recorded) == 2  # forward and backward, once each for all of the sizes
    for output, copy, trace, trace_copy in outputs:  # nobody's results were written over
        assert torch.equal(output, copy)
        assert torch.equal(trace, trace_copy)


def test_weights_and_options_are_not_frozen(recorded, make_head):
    head = make_head(8, groups=2, cuda_graphs=True)
    x = torch.randn(3, 8, 4, 4)
    for _ in range(3):
        y = head(x)
    with torch.no_grad():
        head.block.gn3.bias.add_(1)
    assert (head(x) - y).abs().max() > 0.1
    head.solver = Broyden(1)
    head(x)
    assert head.last_solution.trace.shape == (2, 3)


def test_a_replay_computes_as_torch_is_told_to_now(recorded, make_head):
    head = make_head(8, groups=2, cuda_graphs=True)
    x = torch.randn(3, 8, 4, 4)
    for deterministic in (False, True):
        with torch.backends.cudnn.flags(enabled=True, deterministic=deterministic):
            for _ in range(3):
                head(x)
    assert len(recorded) == 2


@pytest.mark.parametrize("cut", ["channels", "samples", "nothing"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_are_those_of_calls_that_are_not_replayed(recorded, make_head, channels_last, cut):
    whole = torch.randn(6, 16, 4, 5)
    whole = whole.contiguous(memory_format=torch.channels_last) if channels_last else whole
    x = {"channels": whole[:, 4:12], "samples": whole[::2, :8], "nothing": whole[:, :8].clone()}[cut]
    head = make_head(8, groups=2)
    expected = head(x)
    head.cuda_graphs = True
    for _ in range(3):
        y = head(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)


def test_threads_take_turns(recorded):
    """Between filling the inputs and copying the results, no other thread may come."""
    entered, left = threading.Event(), threading.Event()

    def function(batch, shared):
        if batch[0][0] == 1:
            entered.set()
            assert not left.wait(0.3)
        return [2 * batch[0]]

    def run(value):
        results[value] = graphs.run(function, "threads", [torch.full((1,), value)], [torch.ones(1)], dims=[0])[0].item()

    results = {}
    for value in (3, 3):  # met, and recorded
        run(value)
    assert len(recorded) == 1
    first = threading.Thread(target=run, args=(1,))
    first.start()
    entered.wait()
    second = threading.Thread(target=lambda: (run(5), left.set()))
    second.start()
    first.join()
    second.join()
    assert results == {1: 2, 3: 6, 5: 10}


def test_a_thread_records_only_what_it_has_run_itself(recorded):
    """The handles and plans of cuDNN and cuBLAS are a thread's own, and must be there before a recording."""

    def run():
        batch = [torch.full((2,), 3.0)]
        results.append(graphs.run(lambda b, s: [2 * b[0]], "own", batch, [torch.ones(1)], dims=[0])[0])
        counts.append(len(recorded))

    results, counts = [], []
    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert counts == [0, 0, 0, 0]
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counts[4:] == [1, 1]
    assert all(torch.equal(result, torch.full((2,), 6.0)) for result in results)


def test_a_pool_goes_with_its_recordings(recorded, make_head, monkeypatch):
    """Torch gives no memory to a pool whose graphs are all gone."""
    monkeypatch.setattr(graphs, "LIMIT", 1)
    head = make_head(8, groups=2, cuda_graphs=True)
    for size in (2, 2, 3, 3, 2, 2):
        head(torch.randn(1, 8, size, size))
        gc.collect()
        assert len(graphs._pools) <= 1
    assert len(set(recorded)) == 3
    graphs.clear()
    gc.collect()
    assert not graphs._pools


def test_recordings_made_in_inference_mode_serve_training(recorded, make_head):
    head = make_head(8, groups=2, cuda_graphs=True, adjoint=JacobianFree())
    x = torch.randn(2, 8, 3, 3)
    with torch.inference_mode():
        for _ in range(2):
            expected = head(x)
    y = head(x.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert x.grad.isfinite().all()


def test_few_recordings_are_kept(recorded, make_head, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    head = make_head(8, groups=2, cuda_graphs=True)
    for size in (2, 3, 4, 2):
        head(torch.randn(1, 8, size, size))
    assert len(graphs._recordings) == 2


def test_no_samples(recorded, make_head):
    assert make_head(8, groups=2, cuda_graphs=True)(torch.randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)
