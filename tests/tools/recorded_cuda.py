"""The CUDA kernels compiled by nvcc, without a GPU: what ptxas gave each, and a module that records launches."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11
import triton

ROOT = Path(__file__).resolve().parents[2]


class Compiled(NamedTuple):
    """Of a kernel: registers a thread, bytes of local memory a thread (spills), of shared memory that it declares."""

    registers: int
    local: int
    shared: int


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version() -> str:
    text = subprocess.run([find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def switches() -> list[str]:
    """setup.py's for every compiler."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "SWITCHES":
            return ast.literal_eval(statement.value)
    raise LookupError("setup.py has no SWITCHES")


def build(arch: int, folder: Path) -> tuple[ModuleType, dict[str, Compiled]]:
    """The module, and what the kernels take, by their names in its launches. Files sm90_* are compiled as setup.py
    does: for sm_90a, whatever else is asked for."""
    nvcc = [find_nvcc(), *switches(), "-Xcompiler=-fPIC,-fvisibility=hidden"]
    includes = ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    runtime = Path(__file__).with_name("recorded_runtime.cpp")
    commands, objects = [[*nvcc, *includes, "-c", runtime, "-o", folder / "runtime.o"]], []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        target = "90a" if source.name.startswith("sm90_") else str(arch)
        objects.append(folder / f"{source.stem}.o")
        commands.append([*nvcc, f"-gencode=arch=compute_{target},code=sm_{target}", "-c", source, "-o", objects[-1]])
    for command in commands:
        subprocess.run(command, check=True, cwd=ROOT)
    library = folder / "recorded_kernels.so"
    subprocess.run(["g++", "-shared", "-Wl,-z,now", *objects, folder / "runtime.o", "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("recorded_kernels", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, {name: kernel for o in objects for name, kernel in resources(o).items()}


def resources(path: Path) -> dict[str, Compiled]:
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([dump, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Compiled(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"])
    return found


def demangled(name: str) -> str:
    """The kernel's name as csrc has it, with its template's arguments."""
    text = subprocess.run(["c++filt", "-p", name], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"(void )?ifr::cuda::\(anonymous namespace\)::", "", text)
