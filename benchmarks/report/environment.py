"""What measurements depend on: machine, versions, clocks, kernels. `environment.py PATH` writes them as JSON."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from ifr_fast import backends


def environment(device: torch.device) -> dict[str, str]:
    found = {"device": device.type, "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    found["cpu instructions"] = torch.backends.cpu.get_cpu_capability()
    if torch.cpu.get_capabilities().get("amx_bf16"):  # the processor has it; oneDNN uses it in bfloat16
        found["cpu instructions"] += ", AMX"
    found["load before"] = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    found["torch"] = torch.__version__
    for package in ("ifr-fast", "torchdeq", *(["triton"] if device.type == "cuda" else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["python"] = platform.python_version()
    found["kernels"] = "; ".join(f"{name}: {b.reason}" for name, b in backends().items() if b.available)
    if not backends()["cpu"].available:
        found["no compiled kernels for CPUs"] = backends()["cpu"].reason
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found["cuda"], found["cudnn"] = torch.version.cuda, str(torch.backends.cudnn.version())
        found["float32 convolutions"] = "TF32" if torch.backends.cudnn.allow_tf32 else "IEEE"
        found |= nvidia_smi(device)
    return found


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """The driver and the clocks in force, where nvidia-smi is at hand."""
    if shutil.which("nvidia-smi") is None:
        return {"driver": "unknown, there is no nvidia-smi"}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        return {"driver": f"unknown, nvidia-smi says {answer.stdout.strip() or answer.stderr.strip()}"}
    return dict(zip(fields, (value.strip() for value in answer.stdout.split(",")), strict=True))


if __name__ == "__main__":
    machine = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    facts = environment(machine)
    facts |= {f"no {name}": backend.reason for name, backend in backends().items() if not backend.available}
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(", ".join(f"{name} {facts[name]}" for name in ("gpu", "torch", "cuda", "driver_version") if name in facts))
