"""Solves on a GPU end early without waiting: on a device that is not there (tools/taped_cuda.py)."""

import logging

import pytest
import torch
from taped_cuda import Conditional, device_fixture  # noqa: F401

from ifr_fast import Anderson, Broyden, Implicit, Picard, Shine
from ifr_fast.engine import graphs, linearise, pieces, segments
from ifr_fast.kernels import eager

STEPS = 15


@pytest.fixture
def heads(make_head):
    """A head that runs as on a GPU, and its like, which runs as on a CPU: it stops at once."""

    def make(cuda_graphs=False, **options):
        options = {"groups": 2, "backend": "eager", "post_gain": 0.2, **options}
        head, plain = make_head(8, cuda_graphs=cuda_graphs, **options), make_head(8, **options)
        plain.load_state_dict(head.state_dict())
        return head, plain

    return make


@pytest.fixture
def as_on_a_cpu(monkeypatch, device):
    """Runs a head as on a CPU."""

    def run(head, x, grad=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "on_gpu", lambda z: False)
            return results(head, x, grad)

    return run


def results(head, x, grad=None):
    """Everything that a call returns, and gradients."""
    y = head(x)
    solution = head.last_solution
    found = [y.detach(), solution.residual, solution.iterations, solution.trace, solution.status]
    if grad is not None:
        found += torch.autograd.grad(y, [x, *head.parameters()], grad)
    return [t.clone() for t in found]


def assert_same(actual, expected):
    """But for rounding in the parameters' gradients, sums over samples that may be chunked otherwise."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i < 6:
            assert torch.equal(a, e), (i, a.shape, (a - e).abs().max())
        else:
            assert (a - e).norm() <= 1e-4 * e.norm(), i


def test_ends_of_segments():
    assert segments.ends(16) == [3, 7, 11]
    assert segments.ends(8) == [1, 3, 5]
    assert segments.ends(7) == []
    for evaluations in range(1, 70):
        found = segments.ends(evaluations)
        assert found == sorted(set(found))
        assert all(
            b - a >= segments.SHORTEST for a, b in zip([-1, *found], [*found, evaluations - 1], strict=True)
        ) or (not found)


@pytest.mark.parametrize("solver", [Broyden, Anderson, Picard])
@pytest.mark.parametrize("late", [1, 2, 99], ids="segments late: {}".format)
def test_a_launched_solve_ends_once_a_copy_says_so(late, solver, device, heads, as_on_a_cpu):
    """late 1: a copy arrives before the next evaluation is launched. Results: those of a solve that stops at once."""
    head, _ = heads(solver=solver(STEPS, rtol=0.05))
    x = torch.randn(5, 8, 4, 4)
    expected = as_on_a_cpu(head, x)
    needed = int(head.last_solution.iterations.max()) + 1
    assert 1 < needed <= STEPS
    device.batches, device.sent = [], []
    device.arrives = lambda later: later >= late
    assert_same(results(head, x), expected)
    boundaries = [end + 1 for end in segments.ends(STEPS + 1)]
    after = [end for end in boundaries if end >= needed][late - 1 :]
    assert device.evaluations == (after[0] if after else STEPS + 1)


def test_nothing_is_asked_where_no_sample_may_stop(device, heads, monkeypatch):
    x = torch.randn(3, 8, 4, 4)
    heads(solver=Broyden(STEPS, rtol=0.0))[0](x)
    heads(solver=Broyden(5))[0](x)  # too short for segments
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    heads(solver=Broyden(STEPS))[0](x)  # in the user's own graph
    assert device.sent == []
    assert device.evaluations == 2 * (STEPS + 1) + 6


@pytest.mark.parametrize("conditional", [False, True], ids=["pieces", "conditional nodes"])
@pytest.mark.parametrize("workspace", [None, 50_000], ids=["one chunk", "chunks"])
def test_a_replay_ends_early(workspace, conditional, device, heads, as_on_a_cpu, monkeypatch):
    """Forward and backward; the chunks of a batch end by themselves; results are those without graphs."""
    if conditional:
        monkeypatch.setattr(pieces, "conditional_nodes", lambda: Conditional(device))
    options = {"solver": Broyden(STEPS, rtol=0.05, workspace=workspace)}
    options["adjoint"] = Implicit(STEPS, rtol=0.05, workspace=workspace)
    head, _ = heads(True, **options)
    plain, _ = heads(**options)
    plain.load_state_dict(head.state_dict())
    device.arrives = lambda later: True
    for i in range(5):
        x = torch.randn(6, 8, 4, 4) * (1 + i % 2)
        x[4:] *= 3 * (i % 3)  # samples that take longer, and zeros
        x.requires_grad_()
        grad = torch.randn(6, 8, 4, 4)
        expected = as_on_a_cpu(plain, x, grad)
        device.batches = []
        assert_same(results(head, x, grad), expected)
        slowest = int(head.last_solution.iterations.max()) + 1
        if i > 1:  # replayed
            assert device.captures > 0
            most = next((end + 1 for end in segments.ends(STEPS + 1) if end + 1 >= slowest), STEPS + 1)
            if workspace is None:
                assert device.evaluations == most
            else:
                assert most < device.evaluations <= 6 * most
    recorded = [r for r in graphs._recordings.values() if r.pieces]
    assert len(recorded) == 2
    assert all((len(r.pieces) == 1) == conditional for r in recorded)


HALVED = {
    "broyden": {"solver": Broyden(9, rtol=1e-2), "adjoint": Implicit(9, rtol=1e-2)},
    "anderson": {"solver": Anderson(9, rtol=1e-2), "adjoint": Implicit(solver=Anderson(9, rtol=1e-2))},
    "picard": {"solver": Picard(9, rtol=1e-2), "adjoint": Implicit(solver=Picard(9, rtol=1e-2))},
    "8 bits": {"solver": Broyden(9, rtol=1e-2, history_dtype=torch.float8_e5m2), "adjoint": Shine()},
}


@pytest.mark.parametrize("n", [32, 45])
@pytest.mark.parametrize("options", HALVED.values(), ids=HALVED)
def test_a_replay_goes_on_with_half_of_the_samples(options, n, device, heads, as_on_a_cpu, monkeypatch):
    """In the middle, if no more than half still run. Results are those of a solve of all, also where either way ends
    with samples that have used up their steps, or before its last segment."""
    monkeypatch.setattr(pieces, "conditional_nodes", lambda: Conditional(device))
    head, _ = heads(True, **options)
    plain, _ = heads(**options)
    plain.load_state_dict(head.state_dict())
    padded, half, middle = graphs.bucket(n), graphs.bucket(n) // 2, segments.ends(10)[1] + 1
    ways = []
    for slow, unsolvable in ((0, n), (n, 0), (half // 2, 0), (n, half - 3), (0, half - 3), (0, half + 3), (0, 0)):
        x = 3 * torch.randn(n, 8, 3, 3)
        x[:slow] /= 5  # needs about 5 steps
        x[:unsolvable] = 0  # needs more than 9
        x = x[torch.randperm(n)]
        x.requires_grad_()
        grad = torch.randn_like(x)
        expected = as_on_a_cpu(plain, x, grad)
        device.batches, captures = [], device.captures
        actual = results(head, x, grad)
        assert_same(actual, expected)
        if captures and device.captures == captures:  # a replay
            iterations = head.last_solution.iterations
            running = int((torch.cat([iterations, iterations[-1:].expand(padded - n)]) >= middle).sum())
            ways.append(half if running <= half else padded)
            assert set(device.batches[middle:]) == ({ways[-1]} if running else set())
    assert {half, padded} == set(ways)


@pytest.mark.parametrize(("n", "workspace"), [(40, None), (120, 650_000)], ids=["one chunk", "chunks"])
def test_everything_is_met_before_it_is_recorded(n, workspace, device, heads, monkeypatch):
    """Libraries plan their convolutions where they first meet a size, and Triton compiles a kernel where it is first
    launched. Neither must happen while a graph is recorded."""
    monkeypatch.setattr(pieces, "conditional_nodes", lambda: Conditional(device))
    device.arrives = lambda later: True
    head, _ = heads(True, solver=Broyden(STEPS, rtol=1e-3, workspace=workspace))
    met = set()
    convolve, step = linearise.BlockMap._until_tail, eager.step

    def until_tail(self, z, state, *, keep):
        met.add(len(z))
        return convolve(self, z, state, keep=keep)

    def noted_step(state, f, z, at):
        met.add(at)
        return step(state, f, z, at)

    monkeypatch.setattr(linearise.BlockMap, "_until_tail", until_tail)
    monkeypatch.setattr(eager, "step", noted_step)
    x = 3 * torch.randn(n, 8, 3, 3)  # ends early
    head(x)
    before = set(met)
    assert {40, 20} < before
    met.clear()
    head(x)
    assert device.captures == 1
    assert met == before


def test_a_replay_never_waits(device, heads, as_on_a_cpu):
    """No copy arrives: it replays everything."""
    head, _ = heads(True, solver=Broyden(STEPS, rtol=0.05))
    x = torch.randn(5, 8, 4, 4)
    expected = as_on_a_cpu(head, x)
    graphs.clear()
    for _ in range(3):
        device.batches = []
        assert_same(results(head, x), expected)
    assert device.evaluations == STEPS + 1


def test_other_recordings_replays_do_not_end_a_solve(device, heads, as_on_a_cpu):
    """What is known of one replay is not taken for another's."""
    head, _ = heads(True, solver=Broyden(STEPS, rtol=0.02))
    easy, hard = torch.zeros(4, 8, 4, 4), 4 * torch.randn(4, 8, 4, 4)
    expected = [as_on_a_cpu(head, x) for x in (easy, hard)]
    graphs.clear()
    device.arrives = lambda later: True
    for _ in range(4):
        for x, wanted in zip((easy, hard), expected, strict=True):
            assert_same(results(head, x), wanted)


def test_conditional_nodes_that_fail_are_left_out_with_a_word(device, heads, monkeypatch, caplog):
    class Broken(Conditional):
        def begin(self, *_):
            raise RuntimeError("no such node")

    monkeypatch.setattr(pieces, "conditional_nodes", lambda: Broken(device))
    head, plain = heads(True, solver=Broyden(STEPS, rtol=0.05))
    x = torch.randn(4, 8, 4, 4)
    with caplog.at_level(logging.WARNING, "ifr_fast"):
        for size in (4, 5):
            for _ in range(3):
                y = head(x[..., :size])
    assert torch.equal(y, plain(x[..., :5]))
    assert [r.message for r in caplog.records if "no such node" in r.message] == [caplog.records[0].message]
    assert device.tapes == []


def test_conditional_nodes_are_not_blamed_for_another_error(device, monkeypatch, caplog):
    monkeypatch.setattr(pieces, "conditional_nodes", lambda: Conditional(device))

    def out_of_memory():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        pieces.record(out_of_memory, pieces.Pool())
    assert pieces._refused == []
    assert not caplog.records


def test_a_capture_that_fails_gives_the_callers_stream_back(device):
    with pytest.raises(ZeroDivisionError):
        pieces.record(lambda: 1 / 0, pieces.Pool())
    assert device.current == "the caller's"
    assert device.tapes == []
