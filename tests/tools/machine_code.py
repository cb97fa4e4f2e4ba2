"""What compiled GPU code holds, by the disassembler that comes with Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path


def cuobjdump(switch: str, built: Path | str) -> str:
    triton = importlib.util.find_spec("triton")
    tools = Path(triton.origin).parent / "backends/nvidia/bin"
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    command = [tools / "cuobjdump", switch, built]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


def instructions(built: Path | str, name: str) -> list[tuple[str, str]]:
    """The kernels whose names contain `name`, with their instructions."""
    found = [part.split(maxsplit=1) for part in cuobjdump("--dump-sass", built).split("Function : ")[1:]]
    return [(kernel, code) for kernel, code in found if name in kernel]
