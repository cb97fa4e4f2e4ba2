"""Prints a hash of the bits of seeded solves and gradients, a line each: a refactoring changes none of them.

    python tests/tools/bits.py > before.txt
    python tests/tools/bits.py | diff before.txt -

Bits differ between processors, versions of torch and IFR_FAST_ISA: compare on one machine. Public names only.
"""

import hashlib
import itertools
import warnings

import torch

from ifr_fast import (
    Anderson,
    Broyden,
    IFRHead,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Shine,
    Unroll,
    Unrolled,
    fixed_point,
)

FORMS = ("released", "plain", "paper")
SOLVERS = {"broyden": Broyden(9), "anderson": Anderson(7, m=3), "picard": Picard(6), "unroll": Unroll(3)}
ADJOINTS = {
    "implicit": Implicit(),
    "jfb": JacobianFree(),
    "shine": Shine(),
    "phantom": Phantom(3),
    "unrolled": Unrolled(),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native")


def digest(tensors):
    """Of the tensors' values, NaN included, in the order of their indices."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def drawn(head):
    """Affine parameters away from their initial values, so that no term can hide."""
    for name, p in head.block.named_parameters():
        if "gn" in name:
            torch.nn.init.normal_(p, 0.6 if name.endswith("weight") else 0.0, 0.1)
    return head


def of_head(form, solver, adjoint, dtype, backend, *, channels_last=False, n=3, side=7, **options):
    torch.manual_seed(0)
    head = IFRHead(32, form=form, groups=4, mid_channels=48, solver=solver, adjoint=adjoint, backend=backend, **options)
    head = drawn(head).to(torch.float32 if dtype.itemsize == 2 else dtype)
    x = torch.randn(n, 32, side, side + 1, dtype=torch.float64).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    value = head(x.requires_grad_())
    value.backward(torch.randn(value.shape, dtype=torch.float64).to(dtype))
    solved = head.last_solution
    report = [] if solved is None else [solved.residual, solved.iterations, solved.trace, solved.status]
    return digest([value, *report, x.grad, *(p.grad for p in head.parameters())])


def heads():
    for form, solver, adjoint, dtype, backend in itertools.product(FORMS, SOLVERS, ADJOINTS, DTYPES, BACKENDS):
        if (adjoint == "shine" and solver in ("anderson", "picard")) or (
            backend == "native" and dtype == torch.float16
        ):
            continue
        if solver == "unroll" and adjoint != "implicit":
            continue
        name = f"head {form} {solver} {adjoint} {str(dtype)[6:]} {backend}"
        yield name, lambda a=(form, SOLVERS[solver], ADJOINTS[adjoint], dtype, backend): of_head(*a)
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        for adjoint in ("implicit", "shine", "phantom"):
            settings = ("released", Broyden(12, workspace=1 << 20), ADJOINTS[adjoint], dtype, "auto")
            options = {"channels_last": channels_last, "n": 9, "side": 14}
            name = f"chunks {adjoint} {str(dtype)[6:]} {'NHWC' if channels_last else 'NCHW'}"
            yield name, lambda s=settings, o=options: of_head(*s, **o)


def of_fixed_point(solver, adjoint, dtype):
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64).mul(0.15).to(dtype).requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64).to(dtype).requires_grad_()
    value, solved = fixed_point(lambda z, w: torch.tanh(z @ w + x), torch.zeros_like(x), params=[weight], solver=solver,
                                adjoint=adjoint)  # fmt: skip
    value.backward(torch.randn(value.shape, dtype=torch.float64).to(dtype))
    report = [] if solved is None else [solved.residual, solved.iterations, solved.trace, solved.status]
    return digest([value, *report, x.grad, weight.grad])


def functions():
    for solver, adjoint, dtype in itertools.product(SOLVERS, ADJOINTS, DTYPES[:3]):
        if adjoint == "shine" and solver in ("anderson", "picard"):
            continue
        name = f"fixed_point {solver} {adjoint} {str(dtype)[6:]}"
        yield name, lambda a=(SOLVERS[solver], ADJOINTS[adjoint], dtype): of_fixed_point(*a)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, case in [*heads(), *functions()]:
        print(f"{case()}  {name}")


if __name__ == "__main__":
    main()
