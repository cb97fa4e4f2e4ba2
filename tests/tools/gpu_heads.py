"""What the tests of whole heads on a GPU share; a test module that imports it is skipped without one."""

import pytest
import torch

from ifr_fast import Broyden, Implicit, backends
from ifr_fast.engine import graphs

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


@pytest.fixture(autouse=True, name="clean")
def clean_fixture(ieee_arithmetic):
    yield
    graphs.clear()
    torch.cuda.empty_cache()


@pytest.fixture(name="pair")
def pair_fixture(make_head):
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
