"""Fresh random inputs in every run; a failing test prints the seed, and IFR_FAST_SEED repeats it.

Tests marked `full` run under `pytest --full` only: what is left is quick, and meets every part of the package.
"""

import os
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

# Read when triton is first imported, as torchvision does. On a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ifr_fast import IFRHead

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`, behind the installed ifr_fast
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: a core for each worker
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the exhaustive tests too")


def is_full(item):
    return item.get_closest_marker("full") is not None


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's own order: files of many tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if is_full(item)])
        items[:] = [item for item in items if not is_full(item)]
    # Files of few tests compile or run whole programs: begun last, one would go on alone for minutes.
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_terminal_summary(terminalreporter):
    if number := sum(map(is_full, terminalreporter.stats.get("deselected", []))):
        terminalreporter.write_line(f"{number} tests left out: each needs --full")


@pytest.fixture(autouse=True)
def seed():
    value = int(os.environ.get("IFR_FAST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"IFR_FAST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def device():
    """Where the Triton kernels run: on a GPU, or under Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def ieee_arithmetic():
    """Float32 products in float32, which GPUs otherwise form in TF32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out uninitialised holds NaN: what a kernel leaves unwritten shows."""

    def fill(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return filled

    with torch.device("cpu"):
        torch.empty(0)  # torch remembers for good which functions it gives a default device, by what they are now
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, fill(getattr(torch, name)))


@pytest.fixture(scope="module")
def one_thread():
    """Losses to the last digit depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def d2():
    """detectron2's detectors at the size of a test; skips where detectron2 cannot be had."""
    import detectron2_source

    detectron2_source.install()
    import detectron2_systems

    return detectron2_systems


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small dataset in COCO's format."""
    from coco_shapes import write_dataset  # here: it needs pycocotools, which the GPU's tests do without

    return write_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def sweep(shapes, tmp_path_factory):
    """The folder of an ablation that trained every row for an epoch on the shapes."""
    from benchmarks.quality import ablation

    folder = tmp_path_factory.mktemp("sweep")
    options = ["--channels", "32", "--epochs", "1", "--batch-size", "4", "--min-area", "200", "--device", "cpu"]
    ablation.main([str(shapes), "--output", str(folder), *options, "--seeds", "1", "--lrs", "1e-3"])
    return folder


@pytest.fixture
def make_head():
    """IFRHead with every affine parameter away from its initial value, so that no term can hide."""

    def make(channels=16, *, groups=4, dtype=torch.float32, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="form='paper'")
            head = IFRHead(channels, groups=groups, **kwargs)
        for name, p in head.block.named_parameters():
            if "gn" in name:
                torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.1)
        if kwargs.get("post_gain", 1.0) != 1.0:
            torch.nn.init.constant_(head.block.gn3.weight, kwargs["post_gain"])
        return head.to(dtype)

    return make
