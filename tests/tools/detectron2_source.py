"""detectron2 0.6 from PyPI's source archive, without its compiled operators: none of its detectors here calls one."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
from PIL import Image

PACKAGE = "pb1-detectron2==0.6"  # a copy of the release, which is not on PyPI under its own name
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ifr_fast_tests" / PACKAGE


def pip(*command: str, older: str) -> None:
    """Runs pip, the one in the folder `older` where there is one; skips where it fails."""
    path = os.pathsep.join([older, os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "pip", *command]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True)
    if done.returncode:
        pytest.skip(f"pip {' '.join(command)}: {done.stderr.strip()[-300:]}")


def unpacked() -> Path:
    """The folder that holds the package, downloaded where it is not there."""
    if not CACHE.is_dir():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
            older = f"{scratch}/pip"  # newer ones refuse the archive, for one of its extras names a URL
            pip("install", "--target", older, "pip==24.0", older=older)
            options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
            pip("download", *options, PACKAGE, older=older)
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                root = tar.getnames()[0].partition("/")[0]
                tar.extractall(scratch, [m for m in tar if m.name.startswith(f"{root}/detectron2/")], filter="data")
            with contextlib.suppress(OSError):  # another process was quicker
                Path(scratch, root).rename(CACHE)
    return CACHE


def install() -> None:
    """Makes `import detectron2` work beside newer releases of what it needs; skips where it cannot."""
    for name in ("fvcore", "omegaconf", "hydra", "pkg_resources"):
        pytest.importorskip(name, reason=f"{name} is not installed: the [detectron2] extra has it")
    if importlib.util.find_spec("detectron2"):
        return
    sys.path.append(str(unpacked()))
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    if not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.BILINEAR
