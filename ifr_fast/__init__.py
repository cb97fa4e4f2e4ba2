"""Implicit Feature Refinement: the equilibrium of one residual block in place of a tower of convolutions.

See IFRHead, fixed_point and backends.
"""

from .adjoints import Implicit, JacobianFree, Phantom, Shine, Unrolled
from .block import ResidualBlock
from .engine import graphs
from .fixed_point import fixed_point
from .head import IFRHead
from .kernels.choose import backends
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
]
