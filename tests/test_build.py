"""Every way of installing gives a package that imports, and a rebuild compiles what changed and nothing else.

The builds run without a network, in copies of the source tree, and with -O0 for speed.
"""

import email
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
IMPORTS = """
import importlib.metadata, importlib.resources
import ifr_fast, ifr_fast._native, ifr_fast.integrations
assert importlib.resources.files(ifr_fast).joinpath("py.typed").is_file()  # type checkers look for it
assert ifr_fast.__version__ == importlib.metadata.version("ifr-fast")
for module in (ifr_fast, ifr_fast._native, ifr_fast.integrations):
    print(module.__file__)
"""


def run(command: list, cwd: Path, fails: bool = False, **variables: str) -> str:
    """The command's output; its exit status must be as expected. ``variables`` add to a clean environment."""
    ours = ("IFR_FAST_CUDA", "IFR_FAST_ARCHS", "CUDA_HOME", "MAX_JOBS", "LDFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["PATH"] = sysconfig.get_path("scripts") + os.pathsep + env["PATH"]
    env |= {"PIP_NO_INDEX": "1", "CXXFLAGS": "-O0", "IFR_FAST_CUDA": "0"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def build(tree: Path, fails: bool = False, **variables: str) -> str:
    """The log of one build of the extension."""
    return run([sys.executable, "setup.py", "build_ext"], tree, fails, **variables)


def compiled(log: str) -> set[tuple[str, str]]:
    """The (source, target) pairs that a build compiled."""
    return set(re.findall(r"compile (\S+) for (\S+)", log))


def native_module(tree: Path) -> Path:
    """The module that ``build`` left in the tree."""
    return next(tree.glob("build/lib*/ifr_fast/_native*.so"))


def install(folder: Path, *what: str | Path) -> Path:
    """The Python of a new environment with all packages of this one but ifr_fast, which is installed anew.

    The packages are linked one by one: on a common search path this environment's ifr_fast would come first.
    """
    run([sys.executable, "-m", "venv", "--without-pip", "env"], folder)
    python = folder / "env/bin/python"
    packages = Path(run([python, "-c", "import site; print(site.getsitepackages()[0])"], folder).strip())
    for path in [path for folder in site.getsitepackages() for path in Path(folder).glob("*")]:
        if not path.name.startswith(("ifr_fast", "__editable__")) and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    run([python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *what], folder)
    return python


def source_files(scratch: Path) -> list[str]:
    """What belongs to the project, links to folders included: all that git tracks or, without git, all that MANIFEST.in
    and setup.py name."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = run(["git", "ls-files", "-z"], ROOT).split("\0")
    else:
        run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", scratch], ROOT)
        names = (scratch / "ifr_fast.egg-info/SOURCES.txt").read_text().splitlines()
    found = [name for name in names if (ROOT / name).is_file() or (ROOT / name).is_symlink()]
    return [name for name in found if scratch not in Path(name).parents]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A copy of the source files in which the extension has been built."""
    tree = tmp_path_factory.mktemp("built") / "tree"
    for name in source_files(tmp_path_factory.mktemp("listing")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    build(tree)
    return tree


@pytest.fixture
def tree(built: Path, tmp_path: Path) -> Path:
    """A copy of the built tree to change; it keeps file times, so that nothing in it is out of date."""
    return shutil.copytree(built, tmp_path / "tree", symlinks=True)


@pytest.fixture(scope="module")
def wheel(built: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "."], built)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(built: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", program, folder], built)
    return next(folder.glob("*.tar.gz"))


@pytest.mark.parametrize("name", ["ifr_fast._native", "ifr_fast.integrations"])
def test_these_tests_see_an_installed_package(name):
    assert importlib.util.find_spec(name), "ifr_fast is imported from a source tree that is not installed"


def test_wheel_holds_the_package_and_nothing_else(wheel, built):
    kept = {".py", ".pyi", ".md", ".typed"}
    expected = {path.relative_to(built) for path in (built / "ifr_fast").rglob("*") if path.suffix in kept}
    for path in (built / "integrations").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            expected.add("ifr_fast/integrations" / path.relative_to(built / "integrations"))
    expected.add(Path("ifr_fast", "_native" + sysconfig.get_config_var("EXT_SUFFIX")))
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert sorted(name for name in names if not name.parts[0].endswith(".dist-info")) == sorted(expected)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(info))
    required = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert required == ["torch>=2.11"]
    assert metadata["License-Expression"] == "MIT"
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} == {"Paper", "The authors' code"}
    assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()


def test_wheel_imports(wheel, tmp_path):
    python = install(tmp_path, wheel)
    for path in run([python, "-c", IMPORTS], tmp_path).splitlines():
        assert Path(path).is_relative_to(tmp_path / "env")


def test_sdist_holds_what_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    needed = [Path(name) for name in ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run")]
    needed += [Path("tests/constraints.txt"), Path("tests/test_build.py"), Path(".github/workflows/tests.yml")]
    needed += [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")]
    needed += [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py")]
    assert not set(needed) - names
    assert sum(name.match("towers/replace.py") for name in names) == 1, "integrations/ is there under two names"


@pytest.mark.full
def test_sdist_installs_and_imports(sdist, tmp_path):
    python = install(tmp_path, sdist)
    for path in run([python, "-c", IMPORTS], tmp_path).splitlines():
        assert Path(path).is_relative_to(tmp_path / "env")


@pytest.mark.parametrize("mode", ["lenient", pytest.param("strict", marks=pytest.mark.full), "compat"])
def test_editable_install_imports_the_tree_itself(tree, tmp_path, mode):
    python = install(tmp_path, "--config-settings", f"editable_mode={mode}", "-e", tree)
    package, native, integrations = map(Path, run([python, "-c", IMPORTS], tmp_path).splitlines())
    assert package.resolve() == tree / "ifr_fast/__init__.py"
    assert integrations.resolve() == tree / "integrations/__init__.py"
    assert native.is_relative_to(tree)


def test_a_start_inside_the_tree_finds_the_integrations(wheel, tree, tmp_path):
    """Of the package that is installed only the native module is not found, and none is needed."""
    python = install(tmp_path, wheel)
    program = "import ifr_fast, ifr_fast.integrations.towers as towers; print(towers.__file__, ifr_fast.backends())"
    assert run([python, "-c", program], tree).startswith(str(tree / "ifr_fast/integrations/towers/__init__.py"))


def test_an_archive_without_links_gives_the_whole_wheel(wheel, tree, tmp_path):
    link = tree / "ifr_fast/integrations"
    link.unlink()
    link.write_text("../integrations")  # as pip unpacks it from a zip file
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."], tree)
    (unlinked,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(unlinked).namelist() == zipfile.ZipFile(wheel).namelist()


def test_native_module_needs_no_torch(built):
    program = "import sys; import _native; assert 'torch' not in sys.modules"
    run([sys.executable, "-c", program], built, PYTHONPATH=str(native_module(built).parent))


def test_second_build_compiles_nothing(tree):
    log = build(tree)
    assert "ninja: no work to do." in log
    assert not compiled(log)


@pytest.mark.full
def test_deleted_module_is_not_shipped(tree, tmp_path):
    module = tree / "ifr_fast/probe.py"
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w"]
    shipped = []
    for content in ("", None):
        module.unlink() if content is None else module.write_text(content)
        folder = tmp_path / f"wheel{len(shipped)}"
        log = run([*pip_wheel, folder, "."], tree)
        shipped.append("ifr_fast/probe.py" in zipfile.ZipFile(next(folder.glob("*.whl"))).namelist())
    assert shipped == [True, False]
    assert "ninja: no work to do." in log


def test_changed_header_recompiles_its_users_only(tree):
    header, source = tree / "csrc/cpu/probe.h", tree / "csrc/cpu/probe.cpp"
    header.write_text("#define PROBE 1\n")
    source.write_text('#include "probe.h"\nnamespace ifr::IFR_ISA { int probe() { return PROBE; } }\n')
    first = compiled(build(tree))
    assert ("csrc/cpu/probe.cpp", "generic") in first
    assert {path for path, _ in first} == {"csrc/cpu/probe.cpp"}
    header.write_text("#define PROBE 2\n")
    assert compiled(build(tree)) == first


@pytest.mark.full
def test_changed_switch_recompiles(tree):
    names = {Path(source).name for source, _ in compiled(build(tree, CXXFLAGS="-O0 -fsyntax-only"))}
    assert names == {path.name for path in tree.glob("csrc/**/*.cpp")}


def test_compile_error_is_shown_with_its_place(tree):
    (tree / "csrc/cpu/probe.cpp").write_text("int probe() { return missing_name; }\n")
    log = build(tree, fails=True)
    assert "csrc/cpu/probe.cpp:1:" in log
    last = log.rstrip().splitlines()[-1]
    assert "building ifr_fast._native failed; the compiler's own words are above. IFR_FAST_CUDA=0" in last


@pytest.mark.parametrize("tool", ["ninja", "pybind11"])
def test_missing_tool_is_named(tree, tmp_path, tool):
    (tmp_path / f"{tool}.py").write_text("raise ImportError('No module of that name')\n")
    assert f"pip install {tool}" in build(tree, fails=True, PYTHONPATH=str(tmp_path)).splitlines()[-1]


def test_old_setuptools_gets_one_sentence(tree, tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '76.1.0'\n")
    (message,) = build(tree, fails=True, PYTHONPATH=str(tmp_path)).splitlines()
    assert "76.1.0" in message
    assert "pip install 'setuptools>=77'" in message


@pytest.mark.parametrize(("name", "value"), [("IFR_FAST_CUDA", "yes"), ("MAX_JOBS", "0"), ("CXX", "no-such-compiler")])
def test_bad_variable_is_named(tree, name, value):
    message = build(tree, fails=True, **{name: value}).splitlines()[-1]
    assert name in message
    assert value in message


CUDA_SOURCE = r"""
#include <cuda_runtime.h>
__global__ void probe_kernel(float *x) { x[threadIdx.x] += 1; }
extern "C" __attribute__((visibility("default"))) int probe() {
  int version = 0;  // of the runtime, which is linked in: no driver is asked
  return cudaRuntimeGetVersion(&version) == cudaSuccess && version == CUDART_VERSION;
}
"""
SM90_SOURCE = r"""
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compiled for an architecture other than 90a"
#endif
__global__ void sm90_probe_kernel() {}
"""


@pytest.fixture
def cuda_tree(tree) -> Path:
    """The built tree with two CUDA sources added to it."""
    folder = tree / "csrc/cuda"
    folder.mkdir(exist_ok=True)
    (folder / "probe.cu").write_text(CUDA_SOURCE)
    (folder / "sm90_probe.cu").write_text(SM90_SOURCE)
    return tree


@pytest.mark.full
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH or in /usr/local/cuda")
def test_cuda_sources_are_compiled_and_need_no_driver_to_import(cuda_tree):
    log = build(cuda_tree, IFR_FAST_CUDA="auto", IFR_FAST_ARCHS="80")
    sources = {source for source, _ in compiled(log)}
    assert {"csrc/cuda/probe.cu", "csrc/cuda/sm90_probe.cu", "csrc/bindings.cpp"} <= sources
    assert re.search(r"CUDA kernels: \d+ file\(s\) for 80 with ", log)
    program = "import _native, ctypes; assert ctypes.CDLL(_native.__file__).probe() == 1"
    program += "; assert _native.cuda_archs == '80'; assert _native.cuda.splits(5000) == 3"
    run([sys.executable, "-c", program], cuda_tree, PYTHONPATH=str(native_module(cuda_tree).parent))


def test_cuda_sources_are_left_out_on_request(cuda_tree):
    log = build(cuda_tree, IFR_FAST_CUDA="0")
    assert "CUDA kernels: skipped because IFR_FAST_CUDA=0" in log
    assert not compiled(log)


def test_cuda_sources_are_left_out_without_nvcc(cuda_tree, tmp_path):
    log = build(cuda_tree, IFR_FAST_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert f"CUDA kernels: skipped because nvcc was not found in {tmp_path}" in log
    assert not compiled(log)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH or in /usr/local/cuda")
def test_cuda_sources_are_left_out_with_an_old_nvcc(cuda_tree, tmp_path):
    old = tmp_path / "bin/nvcc"
    old.parent.mkdir()
    old.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo release 11.8, V11.8.89 || exec {NVCC} "$@"\n')
    old.chmod(0o755)
    log = build(cuda_tree, IFR_FAST_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert f"CUDA kernels: skipped because {old} is of CUDA 11, too old for sm_90a" in log
    assert not compiled(log)


def test_cuda_on_demand_without_nvcc_is_an_error(cuda_tree, tmp_path):
    message = build(cuda_tree, fails=True, IFR_FAST_CUDA="1", CUDA_HOME=str(tmp_path)).splitlines()[-1]
    assert f"IFR_FAST_CUDA=1, but nvcc was not found in {tmp_path}" in message


def test_cuda_on_demand_without_sources_is_an_error(tree):
    shutil.rmtree(tree / "csrc/cuda", ignore_errors=True)
    message = build(tree, fails=True, IFR_FAST_CUDA="1").splitlines()[-1]
    assert "IFR_FAST_CUDA=1, but csrc/cuda has no .cu file" in message


def test_readme_gives_the_commands_that_ci_runs():
    _, commands = (ROOT / ".ci/run").read_text().split("\n\n")
    assert f"```sh\n{commands}```" in (ROOT / "README.md").read_text()


def test_workflows_run_the_readmes_commands():
    quick, *_ = re.findall(r"^python3 -m venv .*pytest -n.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    jobs = (ROOT / ".github/workflows/tests.yml").read_text()
    assert f"- run: {quick}\n" in jobs
    assert "- run: .ci/run\n" in jobs


@pytest.mark.skipif(not importlib.util.find_spec("check_jsonschema"), reason="check-jsonschema is not installed")
def test_workflows_fit_githubs_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    run([*command, *(ROOT / ".github/workflows").glob("*.yml")], ROOT)
