"""Which kernels run, and that the choice is explained."""

import logging
import subprocess
import sys

import pytest
import torch

import ifr_fast
from ifr_fast.kernels import choose


def test_backends_explain_themselves():
    found = ifr_fast.backends()
    assert list(found) == ["eager", "cpu", "triton", "cuda"]
    assert found["eager"].available
    assert found["cpu"].available, found["cpu"].reason
    assert all(len(b.reason) > 20 for b in found.values())
    assert "OpenMP" in found["cpu"].reason
    assert (found["reference"], found["native"]) == (found["eager"], found["cpu"])  # their names in release 0.1
    assert "native" in found
    assert "metal" not in found
    assert found.get("native") == found["cpu"]
    assert found.get("metal") is None


@pytest.mark.parametrize(
    ("name", "device", "dtype", "module"),
    [
        ("auto", "cpu", torch.float32, "cpu"),
        ("auto", "cpu", torch.float16, "eager"),
        ("auto", "cuda", torch.float64, "eager"),
        ("eager", "cpu", torch.float32, "eager"),
        ("cpu", "cpu", torch.bfloat16, "cpu"),
        ("reference", "cpu", torch.float32, "eager"),
        ("native", "cpu", torch.float32, "cpu"),
    ],
)
def test_choice(name, device, dtype, module):
    assert choose.kernels(name, device, dtype).__name__ == f"ifr_fast.kernels.{module}"


def test_what_the_cpu_kernels_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="backend='cpu' serves CPU tensors"):
        choose.kernels("cpu", "cuda", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend='{name}' is not available: .*(GPU|CUDA)"):
            ifr_fast.IFRHead(8, groups=2, backend=name)
    assert choose.kernels("auto", "cuda", torch.float32).__name__ == "ifr_fast.kernels.eager"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), "80 90a", True),
        ((8, 6), "80 90a", True),
        ((8, 0), "86 90a", False),
        ((8, 0), "90a", False),
        ((10, 0), "80 90a", True),  # 90's portable code
        ((9, 0), "80 100", False),
    ],
)
def test_what_an_extension_was_built_for(capability, archs, runs):
    assert choose.built_for(capability, archs) == runs


def test_choice_is_logged_once(caplog):
    choose.kernels.cache_clear()
    with caplog.at_level(logging.INFO, logger="ifr_fast"):
        for _ in range(3):
            choose.kernels("auto", "cpu", torch.float32)
    assert len(caplog.records) == 1
    assert "cpu kernels" in caplog.text


def test_import_touches_no_cuda():
    code = "import ifr_fast, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extension_everything_still_works_and_says_so():
    code = """
import sys
sys.modules["ifr_fast._native"] = None
import ifr_fast, torch
backend = ifr_fast.backends()["cpu"]
assert not backend.available and "pip install" in backend.reason, backend
head = ifr_fast.IFRHead(8, groups=2)
head(torch.randn(2, 8, 4, 4)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
