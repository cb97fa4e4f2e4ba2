"""IFRHead with Winograd's convolutions against the same head with direct ones, and against one in float64."""

import copy
import io
import os
import pickle
import threading
import warnings

import pytest
import torch
from torch.func import functional_call, grad, vmap

from ifr_fast import Anderson, Broyden, Implicit, JacobianFree, Phantom, Picard, Shine, Status, Unrolled, weight_cache

SOLVERS = [Broyden, Anderson, Picard]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.__name__)
forms = pytest.mark.parametrize("form", ["released", "plain"])
ADJOINTS = [Implicit(), Shine(), JacobianFree(), Phantom(), Unrolled()]
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


@pytest.fixture
def make(make_head):
    """A head that contracts."""

    def made(channels=32, **kwargs):
        return make_head(channels, **{"groups": 4, "post_gain": 0.2, "convolution": "winograd", **kwargs})

    return made


@pytest.fixture
def threads():
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def directly(head):
    other = copy.deepcopy(head)
    other.convolution = "direct"
    return other


def features(n, channels=32, height=9, width=10):
    return torch.randn(n, channels, height, width)


def with_gradients(head, x, cotangent):
    x = x.clone().requires_grad_()
    y = head(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *head.parameters()], cotangent)]


def assert_close(actual, expected, tolerance=1e-5):
    """By the norm of each sample."""
    assert actual.shape == expected.shape
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    assert ((actual - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all()


def same(a, b):
    """Whether two Solutions have the same bits."""
    return all(
        torch.equal(getattr(a, k), getattr(b, k)) for k in ("value", "residual", "iterations", "trace", "status")
    )


@solvers
@forms
@pytest.mark.parametrize("mid_channels", [32, 96])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_iterates(format, mid_channels, form, solver, make):
    """After one step, two and many."""
    head = make(form=form, mid_channels=mid_channels)
    for steps, n in ((1, 3), (2, 17), (15, 1), (15, 2)):
        head.solver = solver(steps, rtol=0.0)
        other, x = directly(head), features(n).contiguous(memory_format=format)
        y = head(x)
        assert y.is_contiguous(memory_format=format)
        assert_close(y, other(x))
        solution, expected = head.last_solution, other.last_solution
        assert torch.equal(solution.status, expected.status)
        torch.testing.assert_close(solution.trace, expected.trace, rtol=1e-2, atol=5e-6)


@pytest.mark.filterwarnings("ignore:form='paper'")
@solvers
def test_iterates_of_the_paper(solver, make):
    """They grow, and only the first ones are alike."""
    head = make(form="paper", post_gain=1.0, solver=solver(2, rtol=0.0))
    x = features(3)
    assert_close(head(x), directly(head)(x), 5e-5)


@pytest.mark.parametrize("size", [(14, 14), (7, 5), (1, 1), (13, 19), (2, 30)], ids=str)
def test_sizes(size, make):
    head = make(groups=2)  # of 16 channels, since a norm of few values magnifies roundings
    x = features(2, 32, *size)
    assert_close(head(x), directly(head)(x), 1e-4 if size == (1, 1) else 1e-5)


def test_no_samples(make):
    head, x = make(), features(0).requires_grad_()
    y = head(x)
    assert y.shape == x.shape
    assert head.last_solution.status.shape == (0,)
    for g in torch.autograd.grad(y.sum(), [x, *head.parameters()]):
        assert not g.any()


@solvers
@forms
def test_bits_depend_on_nothing_but_the_sample(form, solver, make, threads):
    """Not on mates that stop earlier or later, on threads, on chunks, nor on the caller's layout."""
    head = make(64, form=form, mid_channels=32, solver=solver(15, rtol=1e-4))
    x = features(17, 64, 7, 6) * torch.logspace(-2, 1, 17).view(-1, 1, 1, 1)
    cotangent = torch.randn_like(x)
    threads(1)
    expected, *grads = with_gradients(head, x, cotangent)
    solution = head.last_solution
    if solver is not Picard:
        assert solution.iterations.unique().numel() > 1
    for count in (2, 3, 4):
        threads(count)
        for a, e in zip(with_gradients(head, x, cotangent)[:2], (expected, grads[0]), strict=True):
            assert torch.equal(a, e)
        assert same(head.last_solution, solution)
    for i in (0, 8, 16):
        y, grad_x, *_ = with_gradients(head, x[i : i + 1], cotangent[i : i + 1])
        assert torch.equal(y[0], expected[i])
        assert torch.equal(grad_x[0], grads[0][i])
        assert torch.equal(head.last_solution.iterations[0], solution.iterations[i])
    head.solver = solver(15, rtol=1e-4, workspace=4 * 30 * x[0].numel() * 4)
    y, grad_x, *others = with_gradients(head, x.contiguous(memory_format=torch.channels_last), cotangent)
    assert same(head.last_solution, solution)
    assert torch.equal(y, expected)
    assert torch.equal(grad_x, grads[0])
    for a, e in zip(others, grads[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))  # summed in another order


@solvers
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_stops_alone(bad, solver, make, threads):
    head, x = make(solver=solver(6)), features(5)
    expected = head(x)
    x[2, 5, 3, 3] = bad
    for count in (1, 4):
        threads(count)
        y = head(x)
        assert head.last_solution.status[2] == Status.NONFINITE
        assert (head.last_solution.status != Status.NONFINITE).sum() == 4
        for i in (0, 1, 3, 4):
            assert torch.equal(y[i], expected[i])


def errors(head, x):
    """Of the result and every gradient, against the equilibrium and its exact gradients in float64."""
    double, cotangent = directly(head).double(), torch.randn_like(x)
    double.solver, double.adjoint = Broyden(60, rtol=1e-13), Implicit(60, rtol=1e-13)
    expected = with_gradients(double, x.double(), cotangent.double())
    actual = with_gradients(head, x, cotangent)
    return max((a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True))


@forms
@pytest.mark.parametrize("weight_norm", [True, False])
def test_gradients(weight_norm, form, make):
    """A value at ReLU's edge may fall to either side: in one draw of twenty, it does."""
    found = []
    for _ in range(4):
        exact = Broyden(40, rtol=1e-7)
        head = make(
            64,
            groups=8,
            mid_channels=96,
            form=form,
            weight_norm=weight_norm,
            solver=exact,
            adjoint=Implicit(40, rtol=1e-7),
        )
        found.append(errors(head, features(2, 64, 8, 7)))
        if found[-1] <= 5e-6:
            return
    raise AssertionError(found)


@adjoints
@forms
def test_adjoints(form, adjoint, make):
    """A value at ReLU's edge turns a gradient by little: directions are compared. One in a hundred draws has a value so
    near to the edge that they turn by more: of three draws two count."""
    head = make(form=form, mid_channels=64, adjoint=adjoint, solver=Broyden(8, rtol=0.0))
    errors = []
    for _ in range(3):
        x = features(3)
        cotangent = torch.randn_like(x)
        pairs = zip(*(with_gradients(h, x, cotangent) for h in (head, directly(head))), strict=True)
        errors.append(max((actual - expected).norm() / expected.norm() for actual, expected in pairs))
    assert sorted(errors)[1] <= 2e-2


def test_solves_do_not_disturb_each_other(make):
    """What linearisations hold is not what a solve's launches write to."""
    head, x = make(solver=Broyden(8, rtol=0.0), adjoint=Implicit(8, rtol=0.0)), features(3).requires_grad_()
    a, b = head(x), head(2 * x)
    together = torch.autograd.grad(a.sum() + b.square().sum(), [x, *head.parameters()])
    one = torch.autograd.grad(head(x).sum(), [x, *head.parameters()])
    other = torch.autograd.grad(head(2 * x).square().sum(), [x, *head.parameters()])
    for t, p, q in zip(together, one, other, strict=True):
        torch.testing.assert_close(t, p + q, rtol=1e-5, atol=1e-5 * float((p.abs() + q.abs()).max()))


def test_results_do_not_share_memory(make):
    head = make()
    with torch.no_grad():
        first = head(x := features(2))
        kept = first.clone()
        head(features(2))
        second = head(x)
    assert torch.equal(first, kept)
    assert torch.equal(second, first)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_compiled_and_exported(make):
    head, x = make(solver=Broyden(3, rtol=0.0)), features(2).requires_grad_()
    cotangent = torch.randn(2, 32, 9, 10)
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    expected = with_gradients(head, x, cotangent)
    for a, e in zip(with_gradients(compiled, x, cotangent), expected, strict=True):
        assert torch.equal(a, e)
    file = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        torch.export.save(torch.export.export(head.eval(), (x,), dynamic_shapes=(batch,)), file)
        file.seek(0)
        program = torch.export.load(file).module()
        assert torch.equal(program(x), expected[0])
        five = features(5)
        assert torch.equal(program(five), head(five))


def test_transforms(make):
    head, x = make(solver=Broyden(4, rtol=0.0)), features(3)
    params = {name: p.detach() for name, p in head.named_parameters()}

    def loss(params, sample):
        return functional_call(head, params, (sample[None],)).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    cotangent = 3 * head(x[:1]).detach().square()
    _, _, *expected = with_gradients(head, x[:1], cotangent)
    for a, e in zip(each.values(), expected, strict=True):
        torch.testing.assert_close(a[0], e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
    many = features(6).unflatten(0, (2, 3))
    assert torch.equal(vmap(head)(many), head(many.flatten(0, 1)).unflatten(0, (2, 3)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_clones(clone, make):
    head, x = make(), features(2)
    expected = head(x)
    other = clone(head)
    assert other.convolution == "winograd"
    assert torch.equal(other(x), expected)


def test_python_threads(make):
    """Heads and sizes differ. Each thread has memory of its own to work in."""
    cases = [(make(c, mid_channels=m), features(n, c, *s)) for c, m, n, s in (
        (32, 32, 3, (9, 10)), (64, 32, 1, (14, 14)), (32, 64, 5, (4, 3)), (32, 32, 2, (21, 17)), (96, 32, 4, (6, 6)),
    )]  # fmt: skip
    expected = [with_gradients(head, x, torch.ones_like(x)) for head, x in cases]
    weight_cache.clear()
    failures = []

    def work(i):
        try:
            head, x = cases[i % len(cases)]
            for _ in range(4):
                for a, e in zip(with_gradients(head, x, torch.ones_like(x)), expected[i % len(cases)], strict=True):
                    assert torch.equal(a, e)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(7)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process(make, threads):
    """A worker of a DataLoader; the cache's lock may be held where it is forked."""
    threads(1)  # OpenMP's threads do not survive a fork
    head, x = make(), features(2)
    with torch.no_grad():
        expected = head(x)
        with weight_cache._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
            if not process:
                good = False
                try:
                    worker = threading.Thread(target=head, args=(x,))  # another thread than the one that held the lock
                    worker.start()
                    worker.join(60)
                    good = not worker.is_alive() and torch.equal(head(x), expected)
                finally:
                    os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def by_autocast(head, x):
    with torch.autocast("cpu", torch.bfloat16):
        head(x)


def in_float64(head, x):
    head.double()(x.double())


def by_eager(head, x):
    head.block.backend = "eager"
    head(x)


@pytest.mark.parametrize(
    ("run", "words"), [(by_autocast, "torch.bfloat16"), (in_float64, "torch.float64"), (by_eager, "eager")]
)
def test_what_cannot_be_served_is_refused(run, words, make):
    head, x = make(), features(2)
    with pytest.raises(ValueError, match=rf"^convolution='winograd' is for .*{words}"):
        run(head, x)
    head.convolution = "auto"
    run(head, x)


@pytest.mark.parametrize("options", [dict(channels=48, groups=4), dict(channels=32, mid_channels=48)], ids=str)
def test_channels_that_do_not_fit_are_refused(options, make):
    with pytest.raises(ValueError, match=r"^convolution='winograd' is for .*48"):
        make(**options)(features(2, options["channels"]))


def test_defaults_of_torch_change_nothing(make):
    head, x = make(), features(2)
    weight_cache.clear()
    expected = with_gradients(head, x, torch.ones_like(x))
    weight_cache.clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = with_gradients(head, x, torch.ones_like(x, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux lists a process's threads")
@pytest.mark.parametrize("convolution", ["winograd", "direct"])
def test_no_solve_ends_threads_that_the_next_must_start(convolution, make):
    """OpenMP does where parallel regions have different numbers of threads, other than 1."""
    head, threads = make(convolution=convolution), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        head(features(5))
        before = set(os.listdir("/proc/self/task"))
        for n in (1, 2, 3, 5):
            head(features(n))
        assert not set(os.listdir("/proc/self/task")) - before
    finally:
        torch.set_num_threads(threads)
