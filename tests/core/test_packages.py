"""What torch.export and AOTInductor leave, in a fresh process."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from ifr_fast import Anderson, Broyden, Picard, Unroll
from ifr_fast.integrations.torchvision import refine

LOAD = """
import sys, torch{also}
path = sys.argv[1]
model = {loading}
for x, y in torch.load(path + ".pt"):
    actual = model(x)
    assert (actual.shape, actual.dtype) == (y.shape, y.dtype), (actual.shape, actual.dtype)
    tolerance = 1e-4 if y.dtype.itemsize >= 4 else 0.02
    assert not len(x) or (actual - y).abs().max() <= tolerance * y.abs().max(), (actual - y).abs().max()
assert ("ifr_fast" in sys.modules) == {ours}
print("the same")
"""
PACKAGE = "torch._inductor.aoti_load_package(path + '.pt2')"
PROGRAM = "torch.export.load(path + '.pt2').module()"


def program_of(module, x):
    batch = torch.export.Dim("batch", min=0, max=1000)
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=({0: batch},))


def assert_the_same_elsewhere(module, x, folder, loading, ours=True):
    """folder has the module as model.pt2. ours: the other process imports ifr_fast."""
    with torch.no_grad():
        inputs = [torch.randn(n, *x.shape[1:]).to(x.dtype) for n in (0, 1, 2, 7)]
        torch.save([(x, module(x)) for x in inputs], folder / "model.pt")
    script = LOAD.format(also=", ifr_fast" if ours else "", loading=loading, ours=ours)
    command = [sys.executable, "-c", script, str(folder / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert "the same" in done.stdout, done.stderr[-3000:]


def test_a_program_in_a_fresh_process(make_head, tmp_path):
    head, x = make_head(post_gain=0.5).eval(), torch.randn(3, 16, 6, 5)
    torch.export.save(program_of(head, x), tmp_path / "model.pt2")
    assert_the_same_elsewhere(head, x, tmp_path, PROGRAM)


# Every option reaches the op in its string. AOTInductor passes a dtype on as another number.
OPTIONS = {
    "float32": {},
    "float64": dict(dtype=torch.float64, solver=Picard(20)),
    "float16": dict(dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "history in bfloat16": dict(solver=Broyden(7, history_dtype="bfloat16", workspace=1 << 16), mid_channels=8),
    "history in float8": dict(solver=Broyden(7, history_dtype="float8_e5m2", rtol=0.0), form="plain"),
    "Anderson": dict(solver=Anderson(6, m=3, rtol=1e-4, history_dtype="float32"), weight_norm=False),
    "Unroll": dict(solver=Unroll(3)),
}


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_package_in_a_fresh_process(options, make_head, tmp_path):
    head = make_head(**{"post_gain": 0.5, **options}).eval()
    x = torch.randn(3, 16, 6, 5).to(options.get("dtype", torch.float32))
    torch._inductor.aoti_compile_and_package(program_of(head, x), package_path=str(tmp_path / "model.pt2"))
    assert_the_same_elsewhere(head, x, tmp_path, PACKAGE)


@pytest.mark.full
def test_autocast_is_packed_with_its_dtype(make_head, tmp_path):
    head, x = make_head(post_gain=0.5).eval(), torch.randn(3, 16, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        program = program_of(head, x)
    assert '"bfloat16"' in str(program)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_the_same_elsewhere(torch.autocast("cpu", torch.bfloat16)(head), x, tmp_path, PACKAGE)


@pytest.mark.full
def test_a_refined_mask_branch(tmp_path):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    heads, x = refine(model, solver=Broyden(3)).roi_heads, torch.randn(3, 256, 14, 14)
    branch = nn.Sequential(heads.mask_head, heads.mask_predictor)
    torch._inductor.aoti_compile_and_package(program_of(branch, x), package_path=str(tmp_path / "model.pt2"))
    assert_the_same_elsewhere(branch, x, tmp_path, PACKAGE)


@pytest.mark.full
def test_torchs_operators_alone(make_head, tmp_path):
    """What torch.onnx made of a head on its way is packed too, and needs no ifr_fast."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: the [onnx] extra has it")
    head, x = make_head(solver=Broyden(2), post_gain=0.5).eval(), torch.randn(3, 16, 6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(head, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).exported_program
    assert "ifr_fast" not in str(program.graph)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_the_same_elsewhere(head, x, tmp_path, PACKAGE, ours=False)
