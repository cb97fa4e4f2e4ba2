"""Launches of Triton's kernels: what is remembered, when Triton's own launch serves instead, and what they cost."""

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ifr_fast.kernels import triton as package
from ifr_fast.kernels.triton import launch, tiles

TOOLS = Path(__file__).parents[1] / "tools"


def run(tool):
    """What a tool prints, in a process that does not interpret Triton's kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TOOLS / tool]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted(Path(package.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_wrappers_call_none_of_tritons_functions(path):
    """They are slow: triton.cdiv takes as long as a launch. Inside of kernels the compiler calls them."""
    names = {"launch.py": {"jit", "knobs", "__version__"}}.get(path.name, {"jit"})
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "triton":
            assert node.attr in names, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "triton":
            assert path.name == "launch.py", f"line {node.lineno}"


def test_power_of_2():
    for n in range(1, 1030):
        power = tiles.power_of_2(n)
        assert power & (power - 1) == 0
        assert power / 2 < n <= power


# Triton and its driver without a GPU. A kernel is as good as compiled: it notes what it is launched with.


class Compiled:
    def __init__(self, function, device):
        self.function, self.device, self.launches = (function.__name__, device), device, []
        self.packed_metadata = object()

    def launch_metadata(self, *_):
        return "metadata"

    def run(self, *arguments):
        self.launches.append(arguments)


def copied(x, y, n, factor, SIZE: tl.constexpr):
    """Never run."""


@pytest.fixture
def chip(monkeypatch):
    """`compiled`: the kernels so far. `device`: the current one, of this thread. `kernel`: `copied`, with a wide x."""
    current = threading.local()
    chip = SimpleNamespace(compiled=[], current=current)

    def compile_none(function, key, signature, device, constants, options, attributes, warmup):
        found = function.device_caches[device][0][key] = Compiled(function, device)
        found.options = options
        chip.compiled.append(found)
        return found

    fake = SimpleNamespace(
        get_current_device=lambda: getattr(current, "device", 0),
        get_current_stream=lambda device: 1000 + device,
        get_current_target=lambda: GPUTarget("cuda", getattr(current, "arch", 90), 32),
    )
    monkeypatch.setattr(JITFunction, "_do_compile", compile_none)
    monkeypatch.setattr(driver, "_active", fake)
    with monkeypatch.context() as compiled:
        compiled.setenv("TRITON_INTERPRET", "0")
        chip.kernel = launch.jit(wide=["x"])(copied)
    return chip


@pytest.fixture
def only_remembered(monkeypatch):
    """From the call on, Triton's own launch is an error."""

    def refuse(*_, **__):
        raise AssertionError("Triton's own launch")

    return lambda: monkeypatch.setattr(JITFunction, "run", refuse)


def tensors(count=2, dtype=torch.float32):
    return [torch.empty(16, dtype=dtype) for _ in range(count)]


def test_the_installed_version_is_known():
    """Of another version of Triton it has to be found out how a compiled kernel takes its arguments: launch.DIRECT."""
    assert launch.DIRECT


def test_a_second_launch_is_the_first_ones(chip, only_remembered):
    """The same arguments in the same order, but for the hooks, of which there are none."""
    x, y = tensors()
    ready = launch.Launch(chip.kernel, SIZE=16, num_warps=2)
    ready(5, (x, y), (3, 0.5))
    only_remembered()
    ready(5, (x, y), (3, 0.5))
    (found,) = chip.compiled
    first, second = found.launches
    assert first[:6] == second[:6] == (5, 1, 1, 1000, ("copied", 0), found.packed_metadata)
    assert second[6:9] == (None, None, None)
    assert len(first) == len(second) == 9 + 5
    assert all(a is b for a, b in zip(first[9:], second[9:], strict=True))
    a, b = tensors()
    ready(7, (a, b), (1, 2.5))
    assert found.launches[2][0] == 7
    assert found.launches[2][9:11] == (a, b)
    assert found.launches[2][11:] == (1, 2.5, 16)


@pytest.mark.parametrize(("arch", "early"), [(80, False), (89, False), (90, True), (100, True)])
def test_kernels_start_early_where_the_chip_can(chip, arch, early):
    """compile_triton.py checks that they wait before they touch memory."""
    chip.current.arch = arch
    launch.Launch(chip.kernel, SIZE=16)(1, tensors(), (3, 0.5))
    assert chip.compiled[0].options.launch_pdl == early


def test_every_combination_has_its_kernel(chip, only_remembered):
    """dtypes, what is left out, constants, devices."""
    x, half = tensors(1)[0], tensors(1, torch.float16)[0]
    combinations = [(x, x), (half, x), (x, half), (x, None), (None, x)]
    launches = [launch.Launch(chip.kernel, SIZE=size) for size in (16, 32)]
    chosen = {}
    for remembered in (False, True):
        for device in (0, 1):
            chip.current.device = device
            for i, ready in enumerate(launches):
                for j, given in enumerate(combinations):
                    before = [len(found.launches) for found in chip.compiled]
                    ready(1, given, (1, 1.0))
                    if not remembered:
                        chosen[device, i, j] = chip.compiled[-1]
                        continue
                    counts = [len(found.launches) for found in chip.compiled]
                    (used,) = [k for k, pair in enumerate(zip(before, counts, strict=True)) if pair[0] != pair[1]]
                    assert chip.compiled[used] is chosen[device, i, j]
                    assert chip.compiled[used].launches[-1][3:5] == (1000 + device, ("copied", device))
        only_remembered()
    assert len(chip.compiled) == len(set(map(id, chosen.values()))) == 20


def test_numbers_and_narrow_tensors_make_no_variants(chip):
    x, y = tensors()
    ready = launch.Launch(chip.kernel, SIZE=16)
    for number in (0, 1, 2, 16, 17, -1):
        for offset in range(4):
            chip.kernel[(1,)](x, y[offset:], number, 1.0, SIZE=16, launch_pdl=True)
            ready(1, (x, y[offset:]), (number, 1.0))
    assert len(chip.compiled) == 1


def test_a_wide_tensor_at_another_address(chip):
    """Has a variant of its own, whichever comes first."""
    x, y = tensors()
    for first in (0, 1):
        ready = launch.Launch(chip.kernel, SIZE=16 + first)
        chip.compiled.clear()
        for offset in (first, 1 - first, first, 1 - first):
            ready(1, (x[offset:], y), (1, 1.0))
        assert [len(found.launches) for found in chip.compiled] == [2, 2]
        offsets = [{(a[9].data_ptr() - x.data_ptr()) // 4 for a in found.launches} for found in chip.compiled]
        assert offsets == [{first}, {1 - first}]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_is_called(chip, name):
    ready = launch.Launch(chip.kernel, SIZE=16)
    x, y = tensors()
    for _ in range(2):
        ready(1, (x, y), (1, 1.0))
    hook = getattr(triton.knobs.runtime, name)

    def told(metadata):
        """A profiler's."""

    hook.add(told)
    try:
        ready(1, (x, y), (1, 1.0))
    finally:
        hook.remove(told)
    ready(1, (x, y), (1, 1.0))
    first, second, hooked, last = chip.compiled[0].launches
    assert first[6] == hooked[6] == "metadata"
    assert hook in hooked[7:9]
    assert second[6:9] == last[6:9] == (None, None, None)


def test_unknown_versions_are_launched_by_triton(chip, monkeypatch):
    monkeypatch.setattr(launch, "DIRECT", False)
    ready = launch.Launch(chip.kernel, SIZE=16)
    for _ in range(3):
        ready(1, tensors(), (1, 1.0))
    assert [arguments[6] for arguments in chip.compiled[0].launches] == ["metadata"] * 3


def test_threads_on_their_own_devices(chip):
    """The same Launch from several threads at once: each runs its device's kernel, on its stream."""
    ready, given, errors = launch.Launch(chip.kernel, SIZE=16), tensors(), []
    start = threading.Barrier(4)

    def many(device):
        chip.current.device = device
        start.wait()
        try:
            for _ in range(200):
                ready(device + 1, given, (device, 1.0))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(device,)) for device in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for device in range(4):
        launches = [arguments for found in chip.compiled if found.device == device for arguments in found.launches]
        assert len(launches) == 200
        assert {(a[0], a[3], a[4], a[11]) for a in launches} == {
            (device + 1, 1000 + device, ("copied", device), device)
        }


@pytest.mark.full
@pytest.mark.skipif(shutil.which("cc") is None, reason="cc compiles Triton's launcher and the driver's stand-in")
def test_the_driver_is_handed_what_triton_hands_it():
    """By Triton's real launcher, from real kernels; the tool compares."""
    kernels = dict(re.findall(r"(\w+): (\d+) launches", run("launched_parameters.py")))
    assert len(kernels) >= 8
    assert min(map(int, kernels.values())) >= 40


def test_variants_do_not_depend_on_the_number_of_samples():
    """So a warm-up compiles for every capture: of fewer samples, of chunks, of a slice of a batch."""
    lines = re.findall(r"(.*), n=(\d+): (\d+) new(.*)", run("triton_variants.py"))
    seen = {}
    for case, n, new, kernels in lines:
        if case not in seen:
            assert int(new) > 15, case  # the first number of samples compiles everything
            seen[case] = [n]
        else:
            assert new == "0", (case, n, kernels)
            seen[case].append(n)
    assert len(seen) == 15
    assert all(len(numbers) >= 3 for numbers in seen.values())


def test_a_step_costs_little_python():
    """Measured in the same run: against Triton's own launches, and against making an empty tensor. Generous bounds."""
    times = {
        name: (float(ours), float(tritons))
        for ours, tritons, name in re.findall(r"^ +([\d.]+) +([\d.]+)  (.+)$", run("time_launches.py"), re.MULTILINE)
    }
    empty = min(times["an empty result"])
    for name in ("a step of the solve", "a step of the adjoint"):
        ours, tritons = times[name]
        assert ours < 0.8 * tritons, name
        assert ours < 250 * empty, name
