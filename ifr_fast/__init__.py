"""Implicit Feature Refinement: the equilibrium of one residual block in place of a tower of convolutions.

See IFRHead, fixed_point and backends.
"""

from .adjoint import Implicit, JacobianFree, Phantom, Shine, Unrolled
from .backend import backends
from .block import ResidualBlock
from .fixedpoint import fixed_point
from .head import IFRHead
from .rules import Anderson, Broyden, Picard, Unroll
from .solve import Solution, Status

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
    "backends",
    "fixed_point",
]
