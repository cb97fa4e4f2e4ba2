"""Heads in ONNX: ONNX Runtime computes what torch does."""

import pytest
import torch

from ifr_fast import Anderson, Broyden, Picard, Unroll

pytest.importorskip(
    "onnxscript", reason="onnx, onnxscript and onnxruntime are not installed: the [onnx] extra has them"
)
onnxruntime = pytest.importorskip("onnxruntime")


def exported(module, x, path, dims=(0,)):
    """The module as a function of one tensor, computed by ONNX Runtime. dims: those of x that vary."""
    shapes = (dict.fromkeys(dims, torch.export.Dim.DYNAMIC),)
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def assert_the_same(run, module, *inputs):
    for x in inputs:
        with torch.no_grad():
            y = module(x)
        torch.testing.assert_close(run(x), y, rtol=0, atol=1e-4 * float(y.abs().max()) if y.numel() else 0)


@pytest.mark.parametrize("solver", [Broyden(5), Anderson(5, m=3), Picard(5), Unroll(3)], ids=str)
def test_every_solver_goes_into_onnx(solver, make_head, tmp_path):
    head = make_head(solver=solver, post_gain=0.5).eval()
    run = exported(head, torch.randn(2, 16, 6, 5), tmp_path / "head.onnx")
    assert head.last_solution is None
    assert_the_same(run, head, *(torch.randn(n, 16, 6, 5) for n in (0, 1, 7)))
