"""Heads in ONNX: ONNX Runtime computes what torch does."""

import warnings

import pytest
import torch
from torch import nn

from ifr_fast import Anderson, Broyden, Picard, Unroll, Unrolled
from ifr_fast.engine import exported as loop
from ifr_fast.engine import through

pytest.importorskip("onnxscript", reason="onnx, onnxscript, onnxruntime are not installed: the [onnx] extra has them")
onnxruntime = pytest.importorskip("onnxruntime")

FEW = [Broyden(3), Anderson(3, m=2), Picard(3), Unroll(3)]
FIFTEEN = [Broyden(), Anderson(), Anderson(rtol=1e-5, m=10), Picard(), Broyden(rtol=0.0)]
ALL = torch.export.Dim.DYNAMIC


def exported(module, x, path, dims=(0,), **options):
    """The module as a function of one tensor, computed by ONNX Runtime. dims: those of x that vary."""
    if options.setdefault("dynamo", True):
        options.update(dynamic_shapes=(dict.fromkeys(dims, ALL),), verbose=False)
    else:
        options.update(input_names=["x"], dynamic_axes={"x": dict.fromkeys(dims, "n")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, which a convolution meets too
        torch.onnx.export(module, (x,), str(path), **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def assert_the_same(run, head, *inputs, tolerance=1e-4):
    """Of every sample, relative to its largest entry, but for samples at the edge of stopping."""
    for x in inputs:
        with torch.no_grad():
            expected = head(x)
        actual = run(x)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        largest = expected.flatten(1).abs().amax(1)[:, None, None, None]
        close = ((actual - expected).abs() <= tolerance * largest).flatten(1).all(1)
        assert (close | at_the_edge(head, x.dtype)).all()


def at_the_edge(head, dtype):
    """Whose residual was within rounding of rtol, so that rounding says whether the sample takes one more step."""
    if isinstance(head.solver, Unroll):
        return torch.tensor(False)
    rtol, _ = head.solver.resolve(dtype).resolved()
    return ((head.last_solution.trace / rtol - 1).abs() < 1e-3).any(0)


def batches(*size, dtype=torch.float32):
    return [torch.randn(n, *size, dtype=dtype) for n in (0, 1, 7)]


QUICK = (Broyden, Unroll)  # torch's exporter takes seconds
SOME = [solver if isinstance(solver, QUICK) else pytest.param(solver, marks=pytest.mark.full) for solver in FEW]


@pytest.mark.parametrize("solver", SOME, ids=str)
def test_every_solver(solver, make_head, tmp_path):
    head, x = make_head(solver=solver, post_gain=0.5).eval(), torch.randn(2, 16, 6, 5)
    before, solution, state = (
        head(x),
        head.last_solution,
        {name: tensor.clone() for name, tensor in head.state_dict().items()},
    )
    run = exported(head, x, tmp_path / "head.onnx")
    assert head.last_solution is solution
    assert_the_same(run, head, *batches(16, 6, 5))
    assert torch.equal(head(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize("solver", FEW, ids=str)
def test_the_older_exporter(solver, make_head, tmp_path):
    head = make_head(solver=solver, post_gain=0.5).eval()
    run = exported(head, torch.randn(2, 16, 6, 5), tmp_path / "head.onnx", dynamo=False)
    assert_the_same(run, head, *batches(16, 6, 5))


@pytest.fixture
def as_exported(monkeypatch):
    """What a head computes while it is exported, in torch: a function of the head and x."""

    def compute(head, x):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            return head(x)

    return compute


def test_every_rule_is_there():
    assert loop.METHODS.keys() == through.METHODS.keys()


OPTIONS = [
    *[dict(solver=solver) for solver in FIFTEEN], dict(adjoint=Unrolled()), dict(solver=Anderson(m=1)),
    dict(solver=Broyden(1)), dict(form="plain"), dict(form="paper", solver=Broyden(2)), dict(mid_channels=8),
    dict(weight_norm=False), dict(groups=1), dict(dtype=torch.float64), dict(solver=Broyden(30, rtol=1e-4)),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_exported_loop_is_the_solve(options, make_head, as_exported):
    if options.get("form") != "paper":
        options = {"post_gain": 0.5, **options}
    head = make_head(**options).eval()
    for x in batches(16, 6, 5, dtype=options.get("dtype", torch.float32))[1:]:
        assert_the_same(lambda x: as_exported(head, x), head, x, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("solver", FIFTEEN, ids=str)
def test_samples_that_stop_stay(solver, make_head, as_exported):
    """NaN, infinity, and what converges at once, beside what goes on."""
    head, x = make_head(solver=solver, post_gain=0.5).eval(), torch.randn(7, 16, 6, 5)
    x[1, 2, 3, 4], x[2, 0, 0, 0], x[3] = torch.nan, torch.inf, 30 * x[3]
    assert_the_same(lambda x: as_exported(head, x), head, x)
    assert not as_exported(head, x)[1:3].any()
    assert_the_same(lambda x: torch.cat([as_exported(head, sample) for sample in x.split(1)]), head, x)


@pytest.mark.full
@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Picard()], ids=str)
def test_fifteen_steps(solver, make_head, tmp_path):
    head = make_head(32, groups=8, solver=solver, post_gain=0.5).eval()
    run = exported(head, torch.randn(2, 32, 7, 7), tmp_path / "head.onnx")
    assert_the_same(run, head, *batches(32, 7, 7))


@pytest.mark.full
@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_opsets(opset, make_head, tmp_path):
    head = make_head(solver=Broyden(3), post_gain=0.5).eval()
    run = exported(head, torch.randn(2, 16, 6, 5), tmp_path / "head.onnx", opset_version=opset)
    assert_the_same(run, head, *batches(16, 6, 5))


@pytest.mark.full
def test_sizes_that_vary(make_head, tmp_path):
    head = make_head(solver=Anderson(3), post_gain=0.5).eval()
    run = exported(head, torch.randn(2, 16, 6, 5), tmp_path / "head.onnx", dims=(0, 2, 3))
    assert_the_same(run, head, torch.randn(3, 16, 4, 9), torch.randn(1, 16, 1, 2), torch.randn(0, 16, 6, 5))


@pytest.mark.full
def test_float16(make_head, tmp_path):
    head = make_head(solver=Broyden(3), post_gain=0.5).half().eval()
    run = exported(head, torch.randn(2, 16, 6, 5).half(), tmp_path / "head.onnx")
    assert_the_same(run, head, *batches(16, 6, 5, dtype=torch.float16), tolerance=5e-3)


@pytest.mark.full
def test_an_altered_block(make_head, tmp_path):
    head = make_head(weight_norm=False, solver=Broyden(3), post_gain=0.5).eval()
    head.block.conv1 = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
    run = exported(head, torch.randn(2, 16, 6, 5), tmp_path / "head.onnx")
    assert_the_same(run, head, *batches(16, 6, 5)[1:])


@pytest.mark.full
def test_a_program_that_holds_the_op_is_refused(make_head, tmp_path):
    """torch.onnx.export of what torch.export.export made names the op."""
    head, x = make_head(solver=Broyden(3)).eval(), torch.randn(2, 16, 6, 5)
    program = torch.export.export(head, (x,))
    with pytest.raises(Exception, match=r"ifr_fast\.?.*solve"):
        torch.onnx.export(program, (), str(tmp_path / "head.onnx"), dynamo=True, verbose=False)
