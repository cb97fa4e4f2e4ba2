"""The CUDA backend on a machine without a GPU: its kernels compiled by g++ for cuda_emulation/, CPU tensors."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ifr_fast import _native, kernels

ROOT = Path(__file__).resolve().parents[2]
CUDA = f"{kernels.__name__}.cuda"


def is_cuda(module: str) -> bool:
    """Is this the name of a module of the backend?"""
    return module == CUDA or module.startswith(f"{CUDA}.")


def compile_all(commands: list[list]) -> None:
    running = [subprocess.Popen(list(map(str, c)), stderr=subprocess.PIPE, text=True) for c in commands]
    failed = [error for process in running if (error := process.communicate()[1]) and process.returncode]
    assert not failed, failed[0]


@cache
def native() -> ModuleType:
    """The extension's `cuda` module, built anew from the sources beside these tests."""
    if (cxx := shutil.which("g++")) is None:
        pytest.skip("g++ compiles the emulated kernels, and is not there")
    import pybind11

    emulation, folder = ROOT / "tests/tools/cuda_emulation", Path(tempfile.mkdtemp(prefix="ifr_fast_emulation"))
    switches = [cxx, "-std=c++17", "-fPIC", "-fno-extern-tls-init", "-w", "-I", emulation, "-I", ROOT / "csrc"]
    includes = ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    sources = [emulation / "emulation.cpp", emulation / "faults.cu", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    try:
        commands = [[*switches, "-O1", "-xc++", "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
        module = [*switches, *includes, "-O0", "-c", emulation / "module.cpp", "-o", folder / "module.o"]
        compile_all([*commands, module])
        compile_all([[cxx, "-shared", *objects, "-o", folder / "libkernels.so"]])
        link = ["-L", folder, "-lkernels", "-Wl,-rpath,$ORIGIN"]
        compile_all([[cxx, "-shared", folder / "module.o", *link, "-o", folder / "emulated_kernels.so"]])
        spec = importlib.util.spec_from_file_location("emulated_kernels", folder / "emulated_kernels.so")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    finally:
        shutil.rmtree(folder)
    return loaded


@pytest.fixture(scope="module", name="cuda")
def cuda_fixture():
    """ifr_fast.kernels.cuda: on a GPU the module itself; elsewhere, loaded apart from what others import, on emulated
    kernels and as if the GPU had compute capability 9.0."""
    if torch.cuda.is_available():
        if not _native.cuda_archs:
            pytest.skip("the extension was built without CUDA kernels")
        yield importlib.import_module(CUDA)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cuda", native(), raising=False)
        for name in [name for name in sys.modules if is_cuda(name)]:
            patch.delitem(sys.modules, name)
        patch.delattr(kernels, "cuda", raising=False)
        cuda = importlib.import_module(CUDA)
        patch.setattr(cuda.device, "stream", lambda device: 0)
        patch.setattr(cuda.device, "shared_memory", lambda device: 227 << 10)
        patch.setattr(cuda.device, "capability", lambda device: (9, 0))
        yield cuda
        for name in [name for name in sys.modules if is_cuda(name)]:
            del sys.modules[name]
        del kernels.cuda
