"""What must hold of every call of IFRHead and fixed_point: tests/tools/fuzz.py checks it on the cases of fuzz_cases.

A property takes a Checked case and raises AssertionError; what it does not speak of, it passes. Tolerances are what
rounding does to the very case: `Case.exact` and `Case.perturbed` measure it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fuzz_cases import Case, HeadCase, MapCase
from fuzz_measure import Checked, norms, rounding, same, strides
from torch import Tensor

from ifr_fast import Anderson, Implicit, Picard, Status, reference
from ifr_fast.kernels.contract import is_channels_last

FIELDS = ("value", "residual", "iterations", "trace", "status")
PROPERTIES: list[tuple[Callable[[Checked], None], float]] = []


def check(share: float = 1.0) -> Callable:
    """Makes a function a property, checked in this share of the cases: those that run a case again take long."""
    return lambda function: PROPERTIES.append((function, share)) or function


@check()
def inputs_are_left_alone(c: Checked) -> None:
    assert not any(c.modified), f"x, parameters, z0: modified or with a .grad {c.modified}"


@check()
def shape_dtype_and_layout_are_kept(c: Checked) -> None:
    case, out = c.case, c.result.output
    like = c.x if isinstance(case, HeadCase) else case.z0
    assert (out.shape, out.dtype) == (like.shape, like.dtype), (out.shape, out.dtype)
    expected = strides(like if is_channels_last(like) else torch.empty(like.shape))
    assert (isinstance(case, MapCase) and not c.rule) or strides(out) == expected, (like.stride(), out.stride())
    for z, _ in c.result.calls:
        assert (z.shape, z.dtype) == (like.shape, like.dtype), ("f was called with", z.shape, z.dtype)
        assert not c.rule or strides(z) == expected, ("f was called with strides", z.stride())


@check()
def results_require_gradients_where_inputs_do(c: Checked) -> None:
    ignores = isinstance(c.case, MapCase) and c.case.map
    needs_x = c.case.needs_x and ignores not in ("identity", "zero") and len(c.result.calls or [1]) > 0
    needs_params = c.case.needs_params and ignores not in ("identity", "zero", "constant", "expanding")
    expected = c.case.mode == "grad" and (needs_x or needs_params)
    assert c.result.output.requires_grad == expected, expected
    if c.solution:
        assert not any(getattr(c.solution, name).requires_grad for name in FIELDS)


@check()
def report_is_consistent(c: Checked) -> None:
    if not c.rule:
        assert c.solution is None
        return
    s, n = c.solution, c.n
    wide = torch.float64 if c.case.rule_dtype == torch.float64 else torch.float32
    assert s.trace.shape == (c.rule.max_iter + 1, n)
    assert s.residual.shape == s.iterations.shape == s.status.shape == (n,)
    assert s.value.shape == c.x.shape
    assert s.trace.dtype == s.residual.dtype == wide, (s.trace.dtype, s.residual.dtype)
    assert s.iterations.dtype == s.status.dtype == torch.int64
    rtol = torch.tensor(c.rule.rtol, dtype=wide)
    for i in range(n):
        steps, trace, status = int(s.iterations[i]), s.trace[:, i], Status(int(s.status[i]))
        where = f"sample {i}: {status.name} after {steps} steps, residual {s.residual[i]:.3e}, trace {trace.tolist()}"
        finite = trace[: steps + 1][trace[: steps + 1].isfinite()]
        assert 0 <= steps <= c.rule.max_iter, where
        assert same(trace[steps:], trace[steps].expand(c.rule.max_iter + 1 - steps)), f"trace goes on; {where}"
        assert s.residual[i] == (finite.min() if len(finite) else torch.inf), f"residual is not the least; {where}"
        assert (trace[:steps] > rtol).all(), f"went on after it had converged; {where}"
        assert (status == Status.CONVERGED) == bool(trace[steps] <= rtol), where
        assert (status == Status.NONFINITE) == (not trace[steps].isfinite()), where
        assert status != Status.MAX_ITER or steps == c.rule.max_iter, where
        narrow = s.value.dtype == torch.float16  # ends at 65504, where the float32 iterate does not
        assert status != Status.CONVERGED or narrow or s.value[i].isfinite().all(), f"value is not finite; {where}"


def steep(c: Checked) -> bool:
    """Is F a GroupNorm of few values? That of two is nearly a step."""
    return isinstance(c.case, HeadCase) and c.x.shape[1:].numel() <= 4 * c.case.head.block.groups


@check()
def residual_is_the_recomputed_one(c: Checked) -> None:
    if not c.rule or isinstance(c.case, MapCase) or steep(c):
        return  # of fixed_point every evaluation is seen: fixed_point_reports_what_f_did
    for result in (c.result, c.other):
        exact, floor = c.floor(result.solution)
        reported = result.solution.residual.double()
        for i in range(c.n):
            if not (exact[i].isfinite() and reported[i].isfinite()):
                continue  # status_nonfinite_is_true speaks of these
            error, bound = abs(reported[i] - exact[i]), 0.05 * max(reported[i], exact[i]) + floor[i]
            assert error <= bound, f"sample {i}: {reported[i]:.3e} reported, {exact[i]:.3e} ± {floor[i]:.1e} recomputed"


@check()
def fixed_point_reports_what_f_did(c: Checked) -> None:
    """Every evaluation of f was seen: residuals, value, DIVERGED and NONFINITE are judged by them."""
    if not c.rule or not isinstance(c.case, MapCase) or not c.x.numel():
        return
    s = c.solution
    eps = torch.finfo(c.x.dtype).eps
    exact_dtype = c.x.dtype in (torch.float32, torch.float64)
    limit = 1e37 if s.residual.dtype == torch.float32 else 1e306
    for i in range(c.n):
        steps, trace, status = int(s.iterations[i]), s.trace[:, i].double(), Status(int(s.status[i]))
        first, start, extreme, underflows = None, 0.0, False, False
        for k in range(steps + 1):
            z, f = (t[i : i + 1].double() for t in c.result.calls[k])
            g, size, where = norms(f - z).item(), norms(f).item(), f"sample {i}, evaluation {k}: {status.name}"
            first = g if first is None else first
            peak = torch.stack([z, f, f - z]).abs().max().item()
            relative = 0.0 if g == 0 else g / size if size else float("inf")
            overflows = not peak < limit or relative > limit
            extreme |= overflows
            if status == Status.NONFINITE and k == steps:
                assert overflows, f"{where}, but ‖f - z‖ = {g:.3e}, ‖f‖ = {size:.3e}, |z|, |f| ≤ {peak:.1e}"
                continue
            start = start or peak
            # An unrolled solve squares in float32, scaled by its first evaluation: 1e-38 of it is zero.
            underflows |= not c.solves and min(size, g) < 1e-17 * start
            if overflows or underflows:
                continue
            tiny = torch.finfo(s.residual.dtype).tiny * z.numel()
            slack = (1e-4 if c.x.dtype != torch.float64 else 1e-9) * relative + 4 * tiny / max(size, tiny)
            if not exact_dtype:  # f saw z rounded
                lost = 4 * eps * (size + norms(z).item()) + torch.finfo(c.x.dtype).smallest_normal * z.numel()
                slack += 0.1 * relative + lost / max(size, 1e-300)
            assert abs(trace[k] - relative) <= slack, (
                f"{where}, trace {trace[k]:.3e}, truly {relative:.3e} (‖f‖ {size:.1e})"
            )
            assert g <= 1010 * first or status == Status.DIVERGED or trace[k] <= c.rule.rtol, (
                f"{where}, ‖g‖ {first:.1e} → {g:.1e}"
            )
        if status == Status.DIVERGED:
            assert g > 990 * first, f"{where}, ‖g‖ {first:.1e} → {g:.1e}"
        if exact_dtype and s.residual[i].isfinite() and not extreme:
            best = int((s.trace[:, i] == s.residual[i]).nonzero()[0])
            assert same(s.value[i], c.result.calls[best][0][i]), (
                f"sample {i}: value is not the iterate of evaluation {best}"
            )


@check()
def nonfinite_is_true(c: Checked) -> None:
    """A head's NONFINITE at the first evaluation, or at any of a plain iteration over norms, comes from X alone."""
    if not c.rule or not isinstance(c.case, HeadCase):
        return
    peak = c.case.peak()
    bounded = c.case.head.block.form != "paper" and isinstance(c.case.solver, Picard)
    limit = 1e36 if c.case.compute != torch.float64 else 1e305
    for result in (c.result, c.other):
        for i in range(c.n):
            stopped = result.solution.status[i] == Status.NONFINITE
            if stopped and (bounded or result.solution.iterations[i] == 0):
                assert not peak[i] < limit, f"sample {i} is NONFINITE, but F(0) meets nothing above {peak[i]:.1e}"
            assert stopped or c.x[i].isfinite().all(), f"sample {i} of x is not finite: {result.solution.status[i]}"


@check(0.25)
def samples_do_not_see_each_other(c: Checked) -> None:
    if c.n == 0:
        return
    some = torch.randperm(c.n)[: int(torch.randint(1, c.n + 1, ()))]
    alone = c.case.run(some)
    if not c.case.isolated:
        lost, own = (norms(out).isfinite().logical_not() for out in (c.result.output[some], alone.output))
        assert torch.equal(lost, own), (
            f"not finite of samples {some.tolist()}: {own.tolist()}, in the batch {lost.tolist()}"
        )
        return
    pairs = {"output": (alone.output, c.result.output[some])}
    if c.solution:
        for name in FIELDS:
            whole = getattr(c.solution, name)
            pairs[name] = getattr(alone.solution, name), whole[:, some] if name == "trace" else whole[some]
    # Autograd's convolutions of an unroll choose their algorithm by the size of the batch.
    if c.result.grads and c.result.grads[0] is not None and c.solves:
        pairs["gradient"] = alone.grads[0], c.result.grads[0][some]
    for name, (own, batch) in pairs.items():
        error = (own.double() - batch.double()).abs().nan_to_num().max() if own.numel() else 0
        assert same(own, batch), f"{name} of samples {some.tolist()} of {c.n} alone differs by {error:.1e}"


@check(0.1)
def the_same_bits_twice(c: Checked) -> None:
    again = c.case.run()
    assert same(again.output, c.result.output), "output"
    for name in FIELDS if c.solution else ():
        assert same(getattr(again.solution, name), getattr(c.solution, name)), name
    for k, (a, b) in enumerate(zip(again.grads, c.result.grads, strict=True)):
        assert same(a, b), f"gradient {k}"


@check(0.15)
def backends_agree(c: Checked) -> None:
    """Two runs with all inputs off by rounding show how far two backends may be apart."""
    if not c.rule or not c.x.numel():
        return
    eps = rounding(c.case.compute)
    own, other = c.solution, c.other.solution
    moved = [c.case.perturbed(4 * eps).run(backward=False).solution for _ in range(2)]
    for i in range(c.n):
        where = f"sample {i}: {[(Status(int(s.status[i])).name, int(s.iterations[i])) for s in (own, other, *moved)]}"
        unclear = any(s.status[i] != own.status[i] or s.iterations[i] != own.iterations[i] for s in moved)
        traces = torch.stack([s.trace[:, i].double() for s in (own, other, *moved)])
        unclear |= bool(((traces > 0.3 * c.rule.rtol) & (traces < 3 * c.rule.rtol)).any()) or bool(
            (traces < 1e2 * eps).any()
        )
        if traces.shape[1] > 1:  # which of two equal residuals is the smallest is for rounding to say
            lowest = traces.nan_to_num(torch.inf).unique(dim=1).sort(1).values[:, :2]
            unclear |= lowest.shape[1] > 1 and bool((lowest[:, 1] <= (1 + 1e2 * eps) * lowest[:, 0]).any())
        # Anderson's least squares may wander without an end, by rounding alone.
        if unclear or (isinstance(c.rule, Anderson) and own.status[i] != Status.CONVERGED):
            continue
        assert own.status[i] == other.status[i], where
        assert own.iterations[i] == other.iterations[i], where
        spread = max(norms(s.value[i : i + 1].double() - own.value[i : i + 1].double()) for s in moved)
        terms = (own.value, c.x, c.case.z0) if isinstance(c.case, MapCase) else (own.value,)
        size = max(norms(t[i : i + 1]) for t in terms)
        error = norms(own.value[i : i + 1].double() - other.value[i : i + 1].double())
        # Near a singular system what the history was rounded to decides, and moves with none of the inputs.
        stored = torch.finfo(c.rule.history_dtype).eps * traces[0, :-1].min()
        bound = 1e3 * spread + (100 * max(eps, torch.finfo(own.value.dtype).eps) + 10 * stored) * size
        assert not error > bound, f"{where}: values differ by {error.item():.1e}, by rounding {spread.item():.1e}"


@check()
def unrolled_blocks_are_the_blocks(c: Checked) -> None:
    if c.rule or not c.x.numel() or not isinstance(c.case, HeadCase):
        return

    def unrolled(noise: float) -> Tensor:
        f, x = c.case.exact(noise)
        return reference.picard(lambda z: f(z, x), torch.zeros_like(x), steps=c.case.solver.steps)

    expected, eps = unrolled(0.0), rounding(c.case.compute)
    noise = torch.stack([norms(unrolled(eps) - expected) for _ in range(3)]).amax(0)
    for result in (c.result, c.other):
        error = norms(result.output.double() - expected)
        bound = 30 * noise + 4 * max(eps, torch.finfo(c.x.dtype).eps) * norms(expected)
        for i in range(c.n):
            if bound[i].isfinite() and norms(expected)[i] < 1e4:
                assert error[i] <= bound[i], f"sample {i}: off by {error[i]:.1e}, rounding is {bound[i]:.1e}"


@check()
def gradients_are_finite(c: Checked) -> None:
    if not c.result.grads or not c.rule:
        return
    unrolled = not c.solves and isinstance(c.case.solver, Anderson)
    if unrolled and c.case.dtype == torch.float16 and c.x.shape[1:].numel() < c.case.solver.m:
        return  # more differences than unknowns: an unrolled step's gradient is 1e16 and leaves float16's range
    converged = c.solution.status == Status.CONVERGED
    grad_x, *grads = c.result.grads
    finite = norms(c.result.output).isfinite()  # float16 ends at 65504
    asked = (converged & c.ordinary & finite).nonzero().flatten().tolist()

    def fine(t: Tensor | None) -> bool:
        return t is None or not (t.isnan().any() or (t.dtype != torch.float16 and t.isinf().any()))

    for i in asked:
        assert grad_x is None or fine(grad_x[i]), (
            f"gradient of sample {i}, CONVERGED and ordinary: {grad_x[i].flatten()[:4]}"
        )
    # Eq. 5 grows without bound: a sum over its steps can leave float16's range.
    grows = isinstance(c.case, HeadCase) and c.case.head.block.form == "paper"
    if len(asked) == c.n and not (grows and any(g is not None and g.dtype == torch.float16 for g in grads)):
        assert all(fine(g) for g in grads), "gradients of parameters, all samples CONVERGED and ordinary"


@check()
def gradients_are_laid_out_as_x(c: Checked) -> None:
    grad = c.result.grads[0] if c.result.grads else None
    if grad is None or not c.solves or not isinstance(c.case, HeadCase):
        return  # of an unroll autograd's own operators choose the layout
    assert (grad.shape, grad.dtype) == (c.x.shape, c.x.dtype), (grad.shape, grad.dtype)
    expected = strides(c.x if is_channels_last(c.x) else torch.empty(c.x.shape))
    assert strides(grad) == expected, (c.x.stride(), grad.stride())


@check()
def implicit_gradient_is_the_dense_solves(c: Checked) -> None:
    """Of the cases that are solved far in float64."""
    if not c.case.precise or not isinstance(c.case.adjoint, Implicit) or not c.x.numel():
        return
    if steep(c):
        return
    f, x = c.case.exact()
    value, grad = c.solution.value, c.case.upstream
    x = x.detach().requires_grad_()
    w = reference.implicit_gradient(lambda z: f(z, x.detach()), value, grad)
    expected = torch.autograd.grad(f(value, x), x, w)[0]
    gain = norms(w) / norms(grad)  # of how badly the equation is posed, too
    for i in range(c.n):
        if c.solution.status[i] == Status.CONVERGED and c.solution.residual[i] < 1e-9 and gain[i] < 10:
            error = norms(c.result.grads[0][i : i + 1] - expected[i : i + 1]).item()
            assert error <= 1e-5 * norms(w)[i], f"sample {i}: off by {error:.1e} of {norms(w)[i]:.1e}"


def failures(case: Case) -> list[tuple[str, str]]:
    """The properties that do not hold, and how."""
    try:
        checked = Checked(case)
    except Exception as error:
        return [(f"raises {type(error).__name__}", str(error).split("\n")[0])]
    found = []
    for holds, share in PROPERTIES:
        if torch.rand(()) > share:
            continue
        try:
            holds(checked)
        except AssertionError as error:
            found.append((holds.__name__, str(error)))
        except Exception as error:
            found.append((f"{holds.__name__} raises {type(error).__name__}", str(error).split("\n")[0]))
    return found
