"""The CUDA solver's kernels against plain, on a GPU or compiled for the CPU (tools/cuda_emulation); what nvcc makes of
all CUDA kernels."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import ROOT, cuda_fixture, native  # noqa: F401

from ifr_fast import Anderson, Broyden, Picard, Status
from ifr_fast.engine.linearise import BlockMap
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import Step

RULES = [
    Broyden(9, rtol=0.0),
    Broyden(9, rtol=1e-2),
    Anderson(9, rtol=0.0, m=3),
    Anderson(9, rtol=1e-3, m=12),
    Anderson(4, rtol=0.0, m=1),
    Picard(9, rtol=1e-2),
    Picard(1, rtol=0.0),
]
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
pytestmark = pytest.mark.usefixtures("one_thread", "placed", "ieee_arithmetic")
histories = pytest.mark.parametrize("history", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def placed(device):
    """Inputs are drawn where the kernels run."""
    with device:
        yield


def contraction(n: int, size: int):
    """A start, and a map that pulls every sample to its equilibrium at a pace of its own."""
    z0, shift = torch.randn(2, n, size)
    rate = torch.linspace(0.1, 0.8, n).view(-1, 1)
    return z0, lambda z, state: rate * z.sin() + shift


def with_history(rule, history):
    return type(rule)(**{**vars(rule), "history_dtype": history}).resolve(torch.float32)


@pytest.fixture(scope="module")
def reference():
    """plain as it is on a GPU: its algebra in float32, to whose accuracy Anderson's ridge belongs."""

    def new_state(*args, **kwargs):
        state = eager.new_state(*args, **kwargs)
        for name in ("gram", "p", "q", "step", "norms"):
            setattr(state, name, getattr(state, name).float())
        return state

    return SimpleNamespace(**{**vars(eager), "new_state": new_state})


def assert_same_solution(actual, expected, history):
    """Residuals fall to rounding, where nothing agrees, not even which iterate was best: compare down to a floor."""
    scale, floor = (1e-3, 1e-2) if history == torch.bfloat16 else (1e-4, 2e-5)
    torch.testing.assert_close(actual.trace, expected.trace, rtol=10 * scale, atol=floor)
    torch.testing.assert_close(actual.value, expected.value, rtol=scale, atol=floor)
    assert actual.residual.lt(expected.residual * (1 + 10 * scale) + floor).all()


@histories
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("n", "size"), [(3, 4104), (1, 7), (2, 301)])
def test_solves_are_plains(cuda, reference, poisoned, rule, history, n, size):
    """gram_row, the judgement, the rules, combine and finish together; sizes that 8 divides and others."""
    rule = with_history(rule, history)
    z0, f = contraction(n, size)
    actual, expected = (solve(f, z0.clone(), rule, kernels) for kernels in (cuda, reference))
    assert_same_solution(actual, expected, history)
    if rule.rtol > 0:
        assert torch.equal(actual.status, expected.status)
        assert torch.equal(actual.iterations, expected.iterations)


def test_torchs_default_dtype_is_not_the_states(cuda, reference):
    z0, f = contraction(2, 301)
    rule = with_history(Broyden(4, rtol=1e-2), torch.float32)
    expected = solve(f, z0.clone(), rule, reference)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = solve(f, z0.clone(), rule, cuda)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_solution(actual, expected, torch.float32)


@pytest.mark.parametrize("size", [301, 16392])  # three kernels; one
@pytest.mark.parametrize("rule", [Broyden(5, rtol=1e-3), Picard(5, rtol=1e-3)], ids=str)
def test_residuals_of_affine_maps_are_plains(cuda, reference, poisoned, rule, size):
    constant = torch.randn(2, size)
    actual, expected = (
        solve(
            lambda z, state: constant - 1.5 * z,
            torch.zeros_like(constant),
            with_history(rule, torch.float32),
            kernels,
            from_zero=True,
            first=constant,
            affine=True,
        )
        for kernels in (cuda, reference)
    )
    torch.testing.assert_close(actual.trace, expected.trace, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-3, atol=1e-5)


@histories
@pytest.mark.parametrize("rule", [Broyden(6, rtol=0.0), Anderson(6, rtol=1e-2, m=3), Picard(6, rtol=1e-2)], ids=str)
def test_cluster_step_is_the_three_kernels(cuda, reference, monkeypatch, poisoned, rule, history):
    """One kernel in place of gram_row, rule and combine; the last block's share of the unknowns is smaller."""
    rule = with_history(rule, history)
    z0, f = contraction(2, 16392)
    assert cuda.solver.one_kernel(16392, rule.rows, rule.window, history, (9, 0))
    together = solve(f, z0.clone(), rule, cuda)
    monkeypatch.setattr(cuda.device, "capability", lambda device: (8, 0))
    apart = solve(f, z0.clone(), rule, cuda)
    assert_same_solution(together, apart, history)
    assert_same_solution(together, solve(f, z0.clone(), rule, reference), history)
    for field in ("status", "iterations") if rule.rtol > 0 else ():
        assert torch.equal(getattr(together, field), getattr(apart, field))


@pytest.mark.parametrize("size", [304, 307, 16384])
@pytest.mark.parametrize("rule", [Broyden(5, rtol=3e-2), Picard(5, rtol=3e-2)], ids=str)
def test_results_do_not_depend_on_batch_mates(cuda, rule, size):
    rule = with_history(rule, torch.bfloat16)
    z0, shift = torch.randn(2, 3, size)
    z0[1] = torch.nan

    def run(samples):
        return solve(lambda z, state: 0.5 * z.cos() + shift[samples], z0[samples].clone(), rule, cuda)

    together, alone = run([0, 1, 2]), run([2])
    assert together.status[1] == Status.NONFINITE
    for field in ("value", "residual", "status", "iterations"):
        assert torch.equal(getattr(together, field)[2:], getattr(alone, field))
    assert torch.equal(together.trace[:, 2:], alone.trace)


@pytest.mark.parametrize("size", [304, 16384])
@pytest.mark.parametrize("rule", [Broyden(8, rtol=1e-2), Anderson(8, rtol=1e-2), Picard(8, rtol=1e-2)], ids=str)
def test_samples_stop_each_for_its_own_reason(cuda, reference, poisoned, rule, size):
    """Two converge, one at once; one diverges; one is NaN from the start, one becomes infinite; one never ends."""
    rule = with_history(rule, torch.float32)
    z0 = torch.randn(6, size).abs() + 1
    z0[3] = torch.nan
    expanding, failing = torch.zeros(2, 6, 1)
    expanding[2], failing[4] = 1, 1

    def f(z, state):
        f.calls += 1
        out = torch.stack(
            [torch.ones_like(z[0]), 0.3 * z[1].cos(), z[2] ** 2 * 1e4, z[3], 0.9 * z[4] + 1, -3 * z[5].sin()]
        )
        return torch.where((failing > 0) & (f.calls > 3), torch.inf, out)

    solutions = []
    for kernels in (cuda, reference):
        f.calls = 0
        solutions.append(solve(f, z0.clone(), rule, kernels))
    actual, expected = solutions
    assert torch.equal(actual.status, expected.status)
    assert {Status.CONVERGED, Status.DIVERGED, Status.NONFINITE} <= set(actual.status.tolist())
    assert torch.equal(actual.iterations[:5], expected.iterations[:5])
    torch.testing.assert_close(actual.value[:5], expected.value[:5], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(actual.residual[:5], expected.residual[:5], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["released", "paper", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_block_is_solved(cuda, reference, poisoned, form, dtype):
    """From zero, F's tail left to the step, z + X handed from step to step."""
    x = torch.randn(2, 16, 5, 6).to(dtype, memory_format=torch.channels_last)
    convs = 0.1 * torch.randn(2, 16, 16, 3, 3)
    norms = [(1 + 0.1 * torch.randn(16), 0.1 * torch.randn(16)) for _ in range(3)]
    params = [convs[0], *norms[0], convs[1], *norms[1], *(norms[2] if form != "paper" else ())]
    # The paper's form has no equilibrium: its iterates soon differ by their roundings.
    rule = Broyden(2 if form == "paper" else 6, rtol=0.0).resolve(dtype)
    z0 = torch.zeros_like(x, dtype=torch.float32)
    solved = [
        solve(BlockMap(x, params, form, 4, kernels, dtype), z0.clone(), rule, kernels, from_zero=True)
        for kernels in (cuda, reference)
    ]
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(solved[0].trace, solved[1].trace, rtol=10 * tolerance, atol=tolerance)
    error = (solved[0].value - solved[1].value).norm() / solved[1].value.norm()
    assert error < tolerance


@pytest.mark.parametrize("method", ["broyden", "picard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [304, 77, 16384])
def test_a_step_sums_and_shifts(cuda, poisoned, method, dtype, size):
    """f as a sum of addends of three dtypes; the next evaluation's z + X in F's dtype."""
    z, x, a = torch.randn(3, 2, size)
    b, c = torch.randn(2, 2, size)
    x, b, c = x.to(dtype), b.half(), c.bfloat16()
    rows = 1 if method == "picard" else 3
    state = cuda.new_state(z, rows=rows, evaluations=4, history_dtype=torch.float32, from_zero=False)
    torch.testing.assert_close(cuda.shift(z, x, dtype, state), (z + x).to(dtype))
    cuda.step(state, cuda.total(a, b, c), z, Step(method, rows, 0, False, 0.0))
    f = a + b + c
    torch.testing.assert_close(z, f, rtol=1e-5, atol=1e-5)
    assert state.norms[:, 1].allclose(f.square().sum(1))
    torch.testing.assert_close(cuda.shift(z, x, dtype, state), (z + x).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [304, 16384])
def test_residuals_of_zero_and_of_no_scale(cuda, size):
    """A sample solved exactly, one that is zero and solved, one whose f is zero though z is not, and two failures."""
    z = torch.randn(5, size)
    f = torch.stack([z[0], 0 * z[1], 0 * z[2], torch.inf * z[3], torch.nan * z[4]])
    z[1] = 0
    state = cuda.new_state(z, rows=2, evaluations=3, history_dtype=torch.float32, from_zero=False)
    cuda.step(state, f, z, Step("broyden", 2, 0, False, 0.0))
    assert state.residual[:3].tolist() == [0, 0, torch.finfo(torch.float32).max]
    assert state.trace[0].nan_to_num(-1).tolist() == [*state.residual[:3].tolist(), -1, -1]
    assert state.residual[3:].isinf().all()
    expected = [Status.CONVERGED, Status.CONVERGED, Status.MAX_ITER, Status.NONFINITE, Status.NONFINITE]
    assert state.status.tolist() == expected


@pytest.mark.parametrize("size", [304, 16384])
@pytest.mark.parametrize("rule", [Broyden(4, rtol=1e-2), Anderson(4, rtol=0.0, m=2), Picard(4, rtol=0.0)], ids=str)
def test_the_first_step_takes_nothing_from_former_ones(cuda, rule, size):
    """A recorded solve runs again in the same memory."""
    rule = with_history(rule, torch.float32)
    z0, f = contraction(2, size)
    fresh = solve(f, z0.clone(), rule, cuda)

    def worn(*args, **kwargs):
        state = new_state(*args, **kwargs)
        for name in ("gram", "p", "q", "step", "total", "best", "norms", "residual", "trace"):
            getattr(state, name).fill_(torch.nan)
        state.status.fill_(Status.NONFINITE)
        state.iterations.fill_(99)
        state.improved.fill_(False)
        return state

    new_state = cuda.new_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "new_state", worn)
        again = solve(f, z0.clone(), rule, cuda)
    for field in ("value", "residual", "status", "iterations", "trace"):
        assert torch.equal(getattr(again, field), getattr(fresh, field)), field


def test_the_best_iterate_is_an_earlier_one(cuda, reference, poisoned):
    """Its coefficients give it; rows never written, NaN here, do not count."""
    z0 = torch.randn(2, 304)
    noise = torch.tensor([0.0, 0.5, 0.01, 0.7, 0.9, 0.8])

    def f(z, state):
        f.calls += 1
        return z0.sin() + noise[f.calls] * z * (1 if f.calls % 2 else -1)

    values = []
    for kernels in (cuda, reference):
        f.calls = 0
        state = solve(f, z0.clone(), with_history(Broyden(4, rtol=0.0), torch.float32), kernels)
        values.append(state.value)
        assert state.residual.lt(state.trace[-1]).all()
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_most_rows(cuda):
    z0, f = contraction(2, 96)
    rule = with_history(Broyden(64, rtol=1e-4), torch.float32)
    solved = solve(f, z0.clone(), rule, cuda)
    assert (solved.status == Status.CONVERGED).all()
    with pytest.raises(ValueError, match=r"max_iter=65: the GPU kernels keep at most 64 residuals"):
        cuda.new_state(z0, rows=65, evaluations=66, history_dtype=torch.float32, from_zero=False)


def test_empty_batches(cuda):
    for shape in ((0, 304), (2, 0)):
        state = solve(lambda z, state: z, torch.zeros(shape), with_history(RULES[0], torch.float32), cuda)
        assert state.value.shape == shape


def test_which_steps_are_one_kernel(cuda):
    head = 256 * 14 * 14
    assert cuda.solver.one_kernel(head, 15, 15, torch.bfloat16, (9, 0))
    assert not cuda.solver.one_kernel(head, 15, 15, torch.float32, (9, 0))
    assert not cuda.solver.one_kernel(head, 30, 30, torch.bfloat16, (9, 0))
    assert cuda.solver.one_kernel(head, 30, 30, torch.float8_e5m2, (9, 0))
    assert cuda.solver.one_kernel(head, 15, 5, torch.float32, (9, 0))
    assert not cuda.solver.one_kernel(head, 15, 15, torch.bfloat16, (8, 0))
    assert not cuda.solver.one_kernel(head, 15, 15, torch.bfloat16, (10, 0))
    assert not cuda.solver.one_kernel(256 * 100 * 152, 15, 15, torch.bfloat16, (9, 0))
    assert not cuda.solver.one_kernel(1024, 15, 15, torch.bfloat16, (9, 0))
    assert not cuda.solver.one_kernel(head + 1, 15, 15, torch.bfloat16, (9, 0))


FAULTS = {
    "exits_before_the_barrier": "deadlock",
    "lanes_meet_in_different_calls": "lanes of a warp meet in",
    "lane_is_missing": "deadlock",
    "writes_past_shared_memory": "a write past the dynamic shared memory",
    "reads_shared_memory_of_a_block_that_left": "a block that has left",
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulation_finds_faults(name):
    out = torch.zeros(512, device="cpu")
    with pytest.raises(RuntimeError, match=f"{name}: .*{FAULTS[name]}"):
        native().run_fault(name, out.data_ptr())


def test_the_emulation_runs_blocks_and_clusters():
    out = torch.full((4,), torch.nan, device="cpu")
    native().run_fault("fine", out.data_ptr())
    assert (out - 128 * 127 / 2).tolist() == [1, 0, 3, 2]


def test_shared_memory_is_nan_at_first():
    out = torch.zeros(512, device="cpu")
    native().run_fault("reads_before_the_barrier", out.data_ptr())
    assert out[:128].isnan().any()
    assert out[128:].isnan().any()


def default_archs() -> list[str]:
    """Those that setup.py builds for, of which nvcc knows."""
    archs = re.search(r"DEFAULT_ARCHS = (\[.*\])", (ROOT / "setup.py").read_text())[1]
    known = subprocess.run([NVCC, "--list-gpu-arch"], text=True, capture_output=True, check=True).stdout
    return [arch for arch in re.findall(r'"(\w+)"', archs) if f"compute_{arch.rstrip('af')}" in known]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: test_gpu_head_calls.py records graphs")
def test_conditional_parts_of_a_graph_are_asked_for_with_a_status(cuda):
    """The emulation has no graphs, and says so."""
    conditional = importlib.import_module(f"{cuda.__name__}.conditional")
    assert not conditional.available()
    inner = SimpleNamespace(cuda_stream=0)
    for status in (torch.ones(4), torch.ones(4, 2, dtype=torch.int64)[:, 0], torch.ones(4, device="meta").long()):
        with pytest.raises(ValueError, match="status is a Tensor"):
            conditional.begin(status, 1, 4, inner)
    with pytest.raises(RuntimeError, match="begin_part needs CUDA 13"):
        conditional.begin(torch.ones(4, dtype=torch.int64), 1, 4, inner)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH or in /usr/local/cuda")
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(path, marks=[] if path.name == "sm90_step.cu" else pytest.mark.full)  # the quickest
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ],
    ids=lambda path: path.name,
)
def test_nvcc_keeps_everything_in_registers(source: Path, tmp_path):
    archs = ["90a"] if source.name.startswith("sm90_") else default_archs()
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    switches = ["-O3", "-std=c++17", "-DNDEBUG", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "--threads=2"]
    command = [NVCC, *switches, *code, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Function properties for (\S+)\s+(.*)", done.stderr)
    assert {properties for _, properties in kernels} == {
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    }, kernels
