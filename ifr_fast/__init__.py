"""Implicit Feature Refinement: the equilibrium of one residual block in place of a tower of convolutions.

Start with IFRHead, fixed_point and backends. `python -m ifr_fast` prints versions and backends, and tests them.
"""

from typing import TYPE_CHECKING

from .adjoints import Implicit, JacobianFree, Phantom, Shine, Unrolled
from .block import ResidualBlock
from .engine import graphs
from .fixed_point import fixed_point
from .head import IFRHead
from .kernels import weight_cache
from .kernels.choose import backends
from .regularisation import jacobian_penalty
from .solution import Solution, Status
from .solvers import Anderson, Broyden, Picard, Unroll
from .warmup import WarmupUnroll

__all__ = [
    "Anderson",
    "Broyden",
    "IFRHead",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "Picard",
    "ResidualBlock",
    "Shine",
    "Solution",
    "Status",
    "Unroll",
    "Unrolled",
    "WarmupUnroll",
    "backends",
    "fixed_point",
    "graphs",
    "jacobian_penalty",
    "weight_cache",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Reads __version__, on demand, from the installed package's metadata: the version stands nowhere else."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ifr-fast")
        except PackageNotFoundError:  # a source tree that was not installed
            return "unknown"
