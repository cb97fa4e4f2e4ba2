"""Builds ``ifr_fast._native``: one pybind11 module, compiled by ninja, that knows no torch headers.

It therefore builds in seconds in an isolated environment and survives any later torch upgrade. Metadata and
tool settings are in pyproject.toml; this file holds only what a table cannot say.

Environment variables:
    CXX, CXXFLAGS, LDFLAGS  the C++ compiler, and switches added after ours.
    IFR_FAST_CUDA           auto (default): compile csrc/cuda/*.cu if nvcc is found; 0: never; 1: or fail.
    IFR_FAST_ARCHS          GPU architectures, such as "80;90a" (default: the DEFAULT_ARCHS that nvcc knows).
    CUDA_HOME               where bin/nvcc is (default: look on PATH, then in /usr/local/cuda).
    MAX_JOBS                compiles running at once (default: ninja's choice).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # which cannot read the licence in pyproject.toml
    advice = "pip install 'setuptools>=77', or install without --no-build-isolation"
    sys.exit(f"ifr_fast is built with setuptools 77 or newer, and this is {setuptools.__version__}: {advice}.")

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

OLDEST_CUDA = 12
DEFAULT_ARCHS = ["80", "86", "89", "90a", "100", "120"]
SWITCHES = ["-O3", "-std=c++17", "-DNDEBUG", "-Icsrc"]
HIDDEN = ["-fPIC", "-fvisibility=hidden"]
# Each csrc/cpu/*.cpp is compiled once per entry; bindings.cpp picks by what the processor has at run time.
ISA_SWITCHES = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}


class Nvcc(NamedTuple):
    """The CUDA compiler's command, its toolkit's folder, switches to link, the GPU architectures to compile for, and
    CUDA's major version."""

    command: list[str]
    root: Path
    libraries: list[str]
    archs: list[str]
    release: int

    def gencode(self, source: Path) -> list[str]:
        """The -gencode switches of one file; sm90_* files use instructions that 90a alone has."""
        if source.name.startswith("sm90_"):
            return ["-gencode=arch=compute_90a,code=sm_90a"]
        # PTX is for GPUs still to come. That of an "a" variant would run on none of them.
        newest = max(map(arch_number, self.archs))
        ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
        return [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs), ptx]


def arch_number(arch: str) -> int:
    """90 of "90a"."""
    return int(arch.rstrip("af"))


def find_cxx() -> list[str]:
    """The C++ compiler's command."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    needed = f"{asked} (from CXX) was not found" if asked else "install g++ or clang++, or name one in CXX"
    raise PlatformError(f"ifr_fast needs a C++17 compiler: {needed}.")


def links(cxx: list[str], switches: str, source: str = "") -> bool:
    """Whether the compiler makes a shared library of this source with these switches."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [*cxx, *switches.split(), "-shared", "-fPIC", "-xc++", "-", "-o", f"{scratch}/trial.so"]
        return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def isa_variants(cxx: list[str]) -> list[str]:
    """The names in ISA_SWITCHES that fit this machine's architecture and that the compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["generic"]
    known = [isa for isa, switches in ISA_SWITCHES.items() if links(cxx, switches)]
    for isa, switches in ISA_SWITCHES.items():
        if isa not in known:
            print(f"ifr_fast._native: no {isa} variant, {shlex.join(cxx)} refuses {switches}")
    return known


def find_nvcc(cxx: list[str], source: Path) -> Nvcc | None:
    """The CUDA compiler, or None where there is none.

    ``nvcc --dryrun`` says where the toolkit is, for the nvcc on PATH may be a wrapper script elsewhere.
    """
    if home := os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    command = [nvcc, "-ccbin", next(word for word in reversed(cxx) if not word.startswith("-"))]
    with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves temporary files behind
        env = {**os.environ, "TMPDIR": scratch}
        dry_run = subprocess.run([*command, "--dryrun", source], env=env, text=True, capture_output=True)
    found = dict(re.findall(r"^#\$ (\w+)=(.*)$", dry_run.stderr, re.MULTILINE))
    if dry_run.returncode != 0 or "TOP" not in found:
        advice = "IFR_FAST_CUDA=0 builds without CUDA kernels."
        raise PlatformError(f"{nvcc} --dryrun failed. {advice}\n{dry_run.stderr}")
    version = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    release = int(re.search(r"release (\d+)", version)[1])
    libraries = shlex.split(found.get("LIBRARIES", ""))
    return Nvcc(command, Path(found["TOP"]).resolve(), libraries, gpu_archs(nvcc), release)


def gpu_archs(nvcc: str) -> list[str]:
    """What IFR_FAST_ARCHS names, all of which nvcc must know, or else the DEFAULT_ARCHS that it knows."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True, check=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)", listing)}
    asked = re.findall(r"[^;,\s]+", os.environ.get("IFR_FAST_ARCHS", ""))
    for arch in asked:
        if not re.fullmatch(r"\d+[af]?", arch) or arch_number(arch) not in known:
            expected = f"some of {sorted(known)}, which {nvcc} knows ('a' or 'f' may follow)"
            raise OptionError(f"IFR_FAST_ARCHS names {arch!r}; expected {expected}, as in '80;90a'.")
    return asked or [arch for arch in DEFAULT_ARCHS if arch_number(arch) in known]


def plan_cuda(cxx: list[str], sources: list[Path]) -> tuple[Nvcc | None, str]:
    """The CUDA compiler to use, if any, and what to say about it in the build's log."""
    mode = os.environ.get("IFR_FAST_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise OptionError(f"IFR_FAST_CUDA is {mode!r}; expected 0, 1 or auto.")
    if not sources:
        if mode == "1":
            advice = "this version has no CUDA kernels to build, do without (IFR_FAST_CUDA=0 or auto)"
            raise PlatformError(f"IFR_FAST_CUDA=1, but csrc/cuda has no .cu file: {advice}.")
        return None, "none (csrc/cuda has no .cu file)"
    if mode == "0":
        return None, "skipped because IFR_FAST_CUDA=0"
    nvcc = find_nvcc(cxx, sources[0])
    if nvcc and nvcc.release >= OLDEST_CUDA:
        return nvcc, f"{len(sources)} file(s) for {' '.join(nvcc.archs)} with {nvcc.root}"
    if nvcc:
        missing = f"{nvcc.command[0]} is of CUDA {nvcc.release}, too old for sm_90a ({OLDEST_CUDA} or newer is needed)"
    else:
        missing = f"nvcc was not found in {os.environ.get('CUDA_HOME') or 'PATH or /usr/local/cuda'}"
    if mode == "1":
        advice = "install the CUDA toolkit, set CUDA_HOME to it, or do without (IFR_FAST_CUDA=0)"
        raise PlatformError(f"IFR_FAST_CUDA=1, but {missing}: {advice}.")
    return None, f"skipped because {missing}"


class Graph:
    """The build graph: bindings.cpp once, csrc/cpu/*.cpp per instruction set, csrc/cuda/*.cu by nvcc."""

    def __init__(self, writer, folder: Path) -> None:
        self.writer, self.folder, self.objects = writer, folder, []
        writer.variable("builddir", str(folder))

    def rule(self, name: str, command: list[str], more: str = "") -> None:
        line = f"{protect(command)} $switches {more} -MMD -MF $out.d -c $in -o $out"
        self.writer.rule(name, line, description="compile $in for $target", depfile="$out.d", deps="gcc")

    def compile(self, rule: str, source: Path, target: str, switches: list[str]) -> None:
        output = str(self.folder / f"{source.stem}.{target}.o")
        variables = {"switches": protect(switches), "target": target}
        self.objects += self.writer.build(output, rule, str(source), variables=variables)

    def link(self, output: Path, command: list[str], libraries: list[str], more: str = "") -> None:
        line = f"{protect(command)} $in -o $out {protect(libraries)} {more}"
        self.writer.rule("link", line, description="link $out")
        self.writer.build(str(output), "link", self.objects)


def protect(command: list[str]) -> str:
    """The command for the shell, its dollars out of ninja's sight."""
    return shlex.join(command).replace("$", "$$")


def write_graph(graph: Graph, output: Path, sources: list[Path]) -> None:
    """Decide what is compiled and how; the one line printed says so."""
    try:
        import pybind11
    except ImportError as error:
        raise PlatformError(f"ifr_fast is bound by pybind11 ({error}): pip install pybind11.") from error

    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise PlatformError(f"{python_include} has no Python.h: install Python's headers (python3-dev).")
    cxx = find_cxx()
    isas = isa_variants(cxx)
    openmp = "-fopenmp" if links(cxx, "-fopenmp", "#include <omp.h>") else "-fopenmp-simd"
    cuda_sources = [source for source in sources if source.suffix == ".cu"]
    nvcc, cuda_words = plan_cuda(cxx, cuda_sources)
    threads = "" if openmp == "-fopenmp" else f" (single-threaded: {shlex.join(cxx)} refuses -fopenmp)"
    print(f"ifr_fast._native: CPU: {' '.join(isas)}{threads}; CUDA kernels: {cuda_words}")

    graph.rule("cxx", [*cxx, *SWITCHES, *HIDDEN, openmp, "-Wall"], os.environ.get("CXXFLAGS", ""))
    switches = [f"-I{python_include}", f"-I{Path(pybind11.get_include()).resolve()}"]
    switches += [f"-DIFR_HAVE_{isa.upper()}" for isa in isas[1:]]
    switches += [f'-DIFR_CUDA_ARCHS="{" ".join(nvcc.archs)}"'] if nvcc else []
    graph.compile("cxx", Path("csrc/bindings.cpp"), "python", switches)
    # Generic first: of an inline function of the standard library the linker keeps the first copy it meets,
    # and one compiled for AVX-512 would crash the generic path on an older processor.
    for isa in isas:
        for source in (source for source in sources if source.parent.name == "cpu"):
            graph.compile("cxx", source, isa, [f"-DIFR_ISA={isa}", *ISA_SWITCHES[isa].split()])
    libraries = []
    if nvcc:
        graph.rule("nvcc", [*nvcc.command, *SWITCHES, f"-Xcompiler={','.join(HIDDEN)}"])
        for source in cuda_sources:
            graph.compile("nvcc", source, "gpu", nvcc.gencode(source))
        # The static runtime opens the driver when first used, so the module imports without one.
        libraries = [*nvcc.libraries, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    shared = shlex.split(sysconfig.get_config_var("LDCXXSHARED"))[1:]
    graph.link(output, [*cxx, *shared, openmp], libraries, os.environ.get("LDFLAGS", ""))


class FreshBuild(build):
    """Starts from an empty build/lib*, which else keeps modules deleted since the last build and ships them.

    The objects beside it stay, and so does a folder elsewhere that --build-lib names: others may own what it holds.
    """

    def run(self) -> None:
        library = Path(self.build_lib)
        if library.is_dir() and Path(self.build_base) in library.parents:
            shutil.rmtree(library)
        super().run()


class NinjaBuildExt(build_ext):
    """Compiles with ninja, which rebuilds exactly what a changed file, header or switch touches."""

    def build_extension(self, ext: Extension) -> None:
        """Build in a folder that every kind of install shares, then copy the module to where it is wanted."""
        try:
            from ninja import ninja_syntax
        except ImportError as error:
            raise PlatformError(f"ifr_fast is compiled by ninja ({error}): pip install ninja.") from error
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = Path(self.get_finalized_command("build").build_base, f"native{suffix.removesuffix('.so')}")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            graph = Graph(ninja_syntax.Writer(file), folder)
            write_graph(graph, folder / f"_native{suffix}", [Path(source) for source in ext.sources])
        command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
        if jobs := os.environ.get("MAX_JOBS"):
            if not re.fullmatch(r"[1-9]\d*", jobs):
                raise OptionError(f"MAX_JOBS is {jobs!r}; expected a positive whole number.")
            command += ["-j", jobs]
        sys.stdout.flush()
        if subprocess.run(command).returncode != 0:
            advice = "IFR_FAST_CUDA=0 builds without CUDA kernels"
            raise CompileError(f"building {ext.name} failed; the compiler's own words are above. {advice}.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / f"_native{suffix}", target)


def packages(name: str, folder: str) -> list[str]:
    """The package kept in this folder and all those below it, with or without an __init__.py."""
    inner = find_namespace_packages(folder, exclude=["*__pycache__*"])
    return [name, *(f"{name}.{package}" for package in inner)]


kernels = [*Path("csrc").glob("cpu/*.cpp"), *Path("csrc").glob("cuda/*.cu")]
# ifr_fast/integrations is a symbolic link, which an archive may have lost: pip unpacks none from a zip file.
lost = {} if Path("ifr_fast/integrations").is_dir() else {"ifr_fast.integrations": "integrations"}
folders = {"ifr_fast": "ifr_fast"} | lost
setup(
    packages=[package for name, folder in folders.items() for package in packages(name, folder)],
    package_dir=folders,
    ext_modules=[Extension("ifr_fast._native", ["csrc/bindings.cpp", *sorted(map(str, kernels))])],
    cmdclass={"build": FreshBuild, "build_ext": NinjaBuildExt},
)
