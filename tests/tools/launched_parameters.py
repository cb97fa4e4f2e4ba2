"""Compares what CUDA's driver is handed by direct launches and by Triton's own, in a solve and its adjoint.

    python tests/tools/launched_parameters.py

Kernels are compiled for sm_90, and launched by Triton's launcher, but into cuda_emulation/driver.c. Needs a C compiler
and no GPU. Not under TRITON_INTERPRET: a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.backends.nvidia.driver as nvidia
from compile_triton import Recorder
from time_launches import Solve
from triton.runtime.driver import driver

from ifr_fast.kernels.triton import launch

SOURCE = Path(__file__).with_name("cuda_emulation") / "driver.c"
CONFIGURATION = 8  # what driver.c notes after the parameters


class Driver(Recorder):
    """Two devices."""

    launcher_cls = nvidia.CudaLauncher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (
            1,
            hash((name, len(kernel), device)) >> 1 & 2**62 - 1,
            0,
            0,
            1024,
        ),
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
    )
    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device


def build(folder: str) -> ctypes.CDLL:
    """The emulated driver, loaded: whoever asks for libcuda.so.1 from now on gets it."""
    library = Path(folder) / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-I", include, SOURCE, "-o", library]
    subprocess.run([*map(str, command), f"-Wl,-soname,{library.name}"], check=True)
    triton.knobs.nvidia.libcuda_path = folder
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.note.restype = ctypes.c_uint64
    return loaded


def compare(emulated: ctypes.CDLL, compared: Counter[str]) -> None:
    """From now on every launch is made twice, by Triton and directly. AssertionError where the driver is handed
    anything else, or not what the wrapper gave."""
    ours, own = launch.Launch.__call__, launch.JITFunction.run

    def noted(count: int) -> list[int]:
        return [emulated.note(i) for i in range(count)]

    def twice(self: launch.Launch, programs: int, tensors: Sequence, numbers: Sequence) -> None:
        pointers = [t.data_ptr() for t in tensors if t is not None]
        emulated.expect(count := len(pointers) + len(numbers))
        seen = []
        for by_triton in (True, False):
            launch.hooked = lambda by_triton=by_triton: by_triton
            launch.JITFunction.run = own if by_triton else None
            before = emulated.launched()
            ours(self, programs, tensors, numbers)
            assert emulated.launched() == before + 1
            found = noted(count + CONFIGURATION)
            seen.append(
                [*found[: len(pointers)], *(x & 0xFFFFFFFF for x in found[len(pointers) : count]), *found[count:]]
            )
        assert seen[0] == seen[1], self.function.__name__
        assert seen[1][: len(pointers)] == pointers
        assert seen[1][count : count + 4] == [programs, 1, 1, 32 * self.constants["num_warps"]]
        assert seen[1][-2] == 1000 + driver.active.get_current_device()
        compared[self.function.__name__] += 1

    launch.Launch.__call__ = twice


def main() -> int:
    active, compared = Driver(90), Counter()
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = f"{folder}/cache"
        emulated = build(folder)
        nvidia.PyCUtensorMap = object
        driver.set_active(active)
        compare(emulated, compared)
        timed = Solve()
        for device in (0, 1, 0):
            active.device = device
            timed.forward()
            timed.adjoint()
            timed.linearised.vjp_params(torch.zeros_like(timed.activation(torch.float32)))
    for name, number in sorted(compared.items()):
        print(f"{name}: {number} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
