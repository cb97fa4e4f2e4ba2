"""Recording and replaying, without a GPU: a replay is the recorded function run again on the recording's buffers."""

import pytest
import torch

from ifr_fast import Broyden, JacobianFree, graphs


@pytest.fixture
def recorded(monkeypatch):
    """Captures work on this device; the list counts them."""
    captures = []

    def capture(function, pool):
        captures.append(pool)
        results = [r.clone() for r in function()]

        def replay():
            for kept, new in zip(results, function(), strict=True):
                kept.copy_(new)

        return replay, results

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "current_stream", lambda device: device)
    monkeypatch.setattr(graphs, "usable", lambda x: len(x) > 0)
    graphs.clear()
    yield captures
    graphs.clear()


def test_buckets():
    buckets = [graphs.bucket(n) for n in range(1, 1025)]
    assert all(n <= b <= 1.125 * n for n, b in enumerate(buckets, 1))
    assert len(set(buckets)) == 16 + 8 * 6
    assert graphs.bucket(100) == 104


@pytest.mark.parametrize("channels_last", [False, True])
def test_varying_batches_replay_one_recording(recorded, make_head, channels_last):
    head = make_head(8, groups=2, solver=Broyden(4, rtol=0.0))
    plain = make_head(8, groups=2, solver=Broyden(4, rtol=0.0))
    plain.load_state_dict(head.state_dict())
    head.cuda_graphs = True
    outputs = []
    for n in (57, 58, 60, 59, 57):
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
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
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
