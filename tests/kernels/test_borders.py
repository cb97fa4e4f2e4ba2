"""No address of a tensor that does not fit reaches compiled code: a ValueError names the tensor instead."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import cuda_fixture  # noqa: F401
from torch._subclasses import FakeTensorMode

from ifr_fast.kernels import cpu
from ifr_fast.kernels.contract import Norm, Step
from ifr_fast.kernels.gpu import STATE, DeviceState

N, C, GROUPS, H, W = 2, 8, 2, 3, 5


def short(t):
    """One element too few, in the last dimension of more than one."""
    dim = max(d for d in range(t.dim()) if t.shape[d] > 1)
    return t.narrow(dim, 0, t.shape[dim] - 1).clone()


def long(t):
    dim = max(d for d in range(t.dim()) if t.shape[d] > 1)
    return torch.cat([t, t.narrow(dim, 0, 1)], dim)


def gapped(t):
    """Every second number of a larger tensor."""
    out = torch.stack([t, t], -1)[..., 0]
    assert not out.is_contiguous()
    return out


def fake(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


WRONG = {
    "dtype": lambda t: t.to(torch.float16 if t.dtype != torch.float16 else torch.int32),
    "too short": short,
    "too long": long,
    "empty": lambda t: t.new_empty(0),
    "gapped": gapped,
    "meta": lambda t: t.to("meta"),
    "fake": fake,
}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="inputs are drawn on the CPU")
wrongs = pytest.mark.parametrize("wrong", WRONG)


def activation(dtype=torch.float32):
    return torch.randn(N, C, H, W).to(dtype, memory_format=torch.channels_last)


def pair():
    return torch.randn(C), torch.randn(C)


def statistics():
    return torch.randn(N, GROUPS), torch.rand(N, GROUPS)


# Every function of tensors: how to call it with all of them by name, and their names. Activations are converted and
# laid out where need be, so that another dtype or layout of theirs is no error.
def norm_relu(k, y, weight, bias):
    return k.norm_relu(y, Norm(weight, bias, GROUPS))


def norm_relu_vjp(k, grad, y, weight, bias, mean, rstd):
    return k.norm_relu_vjp(grad, y, Norm(weight, bias, GROUPS), [mean, rstd], params=True)


def norm_tail(k, y, shortcut, **norms):
    first, second = (Norm(norms[f"{name} weight"], norms[f"{name} bias"], GROUPS) for name in ("first", "second"))
    return k.norm_tail(y, shortcut, first, second)


def norm_tail_vjp(k, grad, y, shortcut, **others):
    first, second = (Norm(others[f"{name} weight"], others[f"{name} bias"], GROUPS) for name in ("first", "second"))
    given = [others[name] for name in ("mean", "rstd", "second mean", "second rstd")]
    return k.norm_tail_vjp(grad, y, shortcut, first, second, given, params=True)


def arguments(function):
    """Fitting ones."""
    norms = {"weight": pair()[0], "bias": pair()[1]}
    if "tail" in function.__name__:
        norms = {f"{name} {part}": t for name in ("first", "second") for part, t in norms.items()}
    found = {"y": activation(), **norms}
    if "tail" in function.__name__:
        found["shortcut"] = activation()
    if "vjp" in function.__name__:
        found["grad"] = activation()
        found["mean"], found["rstd"] = statistics()
        if "tail" in function.__name__:
            found["second mean"], found["second rstd"] = statistics()
    return found


CASES = [(f, name) for f in (norm_relu, norm_relu_vjp, norm_tail, norm_tail_vjp) for name in arguments(f)]
cases = pytest.mark.parametrize(("function", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))


def refuses(call, name):
    """call() is a ValueError about `name`; where that is y, about whatever does not fit it."""
    with pytest.raises(ValueError, match="expected" if name == "y" else name):
        call()


def check_norms(kernels, function, name, wrong):
    fitting = arguments(function)
    if name == "y" and function is norm_relu and wrong in ("too short", "too long"):
        pytest.skip("another fitting y")
    if name == "y" and wrong == "dtype" and kernels is not cpu:
        pytest.skip("a dtype that the kernels take")
    call = partial(function, kernels, **{**fitting, name: WRONG[wrong](fitting[name])})
    if (wrong == "gapped" and name in ("y", "shortcut", "grad")) or (wrong == "dtype" and name in ("shortcut", "grad")):
        call()
    else:
        refuses(call, name)


@wrongs
@cases
def test_cpu_norms(function, name, wrong):
    check_norms(cpu, function, name, wrong)


@needs_no_gpu
@wrongs
@cases
def test_cuda_norms(cuda, function, name, wrong):
    check_norms(cuda, function, name, wrong)


@needs_no_gpu
@wrongs
@cases
def test_triton_norms(function, name, wrong):
    pytest.importorskip("triton")
    check_norms(import_module("ifr_fast.kernels.triton"), function, name, wrong)


@needs_no_gpu
@wrongs
@cases
def test_triton_norms_within_a_solve(function, name, wrong):
    """What was checked in a step before is not checked again. It does not vouch for another tensor."""
    pytest.importorskip("triton")
    triton, state = import_module("ifr_fast.kernels.triton"), device_state(activation())
    names = ("norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp")
    within = SimpleNamespace(**{name: partial(getattr(triton, name), state=state) for name in names})
    function(within, **arguments(function))
    check_norms(within, function, name, wrong)


@needs_no_gpu
@wrongs
def test_triton_norms_check_a_new_status(wrong):
    pytest.importorskip("triton")
    triton, state, norm = import_module("ifr_fast.kernels.triton"), device_state(activation()), Norm(*pair(), GROUPS)
    triton.norm_relu(activation(), norm, state=state)
    state.status = WRONG[wrong](state.status)
    refuses(lambda: triton.norm_relu(activation(), norm, state=state), "state.status")


@needs_no_gpu
@cases
def test_triton_norms_at_any_address(function, name):
    """A caller's slice may begin between two multiples of 16 bytes."""
    pytest.importorskip("triton")
    triton, given = import_module("ifr_fast.kernels.triton"), arguments(function)
    moved = torch.empty(given[name].numel() + 1)[1:].as_strided(given[name].shape, given[name].stride())
    moved = moved.copy_(given[name])
    assert moved.data_ptr() % 16
    expected, actual = (function(triton, **tensors) for tensors in (given, {**given, name: moved}))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", [norm_relu, norm_relu_vjp, norm_tail, norm_tail_vjp])
def test_fitting_arguments_are_taken(function):
    function(cpu, **arguments(function))


@pytest.mark.parametrize("kernels", [cpu, pytest.param("cuda", marks=needs_no_gpu)])
def test_a_norm_has_both_parameters(kernels, request):
    kernels = cpu if kernels is cpu else request.getfixturevalue("cuda")
    with pytest.raises(ValueError, match="bias is NoneType"):
        kernels.norm_relu(activation(), Norm(pair()[0], None, GROUPS))


@pytest.mark.parametrize("groups", [0, -1, 3, 16])
def test_groups_divide_the_channels(groups):
    with pytest.raises(ValueError, match=f"divisible by groups={groups}"):
        cpu.norm_relu(activation(), Norm(*pair(), groups))


def test_a_transforms_tensors_have_no_address():
    """torch.func hands over tensors that stand for others."""
    y, (weight, bias) = activation(), pair()
    for wrapped in (torch.func.grad, torch.func.vmap):
        with pytest.raises((ValueError, RuntimeError)):
            wrapped(lambda w: cpu.norm_relu(y, Norm(w, bias, GROUPS))[0].sum())(
                weight if wrapped is torch.func.grad else weight.expand(3, -1)
            )


def step(evaluation):
    return Step("broyden", 4, evaluation, last=False, rtol=0.0)


def cpu_state(z):
    return cpu.new_state(z, rows=4, evaluations=5, history_dtype=torch.float32, from_zero=False)


def device_state(z):
    return DeviceState(z, rows=4, evaluations=5, history_dtype=torch.float8_e5m2)


def check_step(kernels, new_state, name, wrong, evaluation):
    """A step with a tensor replaced, the first or the second."""
    tensors = {"f": activation(), "z": activation()}
    state = new_state(tensors["z"])
    for k in range(evaluation):
        kernels.step(state, *tensors.values(), step(k))
    if name in tensors:
        tensors[name] = WRONG[wrong](tensors[name])
    else:
        setattr(state, name, WRONG[wrong](getattr(state, name)))
    refuses(lambda: kernels.step(state, *tensors.values(), step(evaluation)), name)


@wrongs
@pytest.mark.parametrize("evaluation", [0, 1])
@pytest.mark.parametrize("name", ["f", "z", *cpu.STATE])
def test_cpu_step(name, wrong, evaluation):
    check_step(cpu, cpu_state, name, wrong, evaluation)


@needs_no_gpu
@wrongs
@pytest.mark.parametrize("name", ["f", "z", *STATE])
def test_cuda_step(cuda, name, wrong):
    if name == "f" and wrong in ("dtype", "gapped"):
        pytest.skip("converted")
    check_step(cuda, device_state, name, wrong, 0)


@needs_no_gpu
@wrongs
@pytest.mark.parametrize("evaluation", [0, 1])
@pytest.mark.parametrize("name", ["f", "z", *STATE])
def test_triton_step(name, wrong, evaluation):
    pytest.importorskip("triton")
    if name == "f" and wrong in ("dtype", "gapped"):
        pytest.skip("converted")
    check_step(import_module("ifr_fast.kernels.triton"), device_state, name, wrong, evaluation)


@pytest.mark.parametrize("evaluation", [-1, 5])
def test_an_evaluation_has_its_place_in_the_trace(evaluation):
    z = activation()
    with pytest.raises(ValueError, match=f"evaluation={evaluation}"):
        cpu.step(cpu_state(z), z.clone(), z, step(evaluation))


def test_f_is_laid_out_as_z():
    z = activation()
    with pytest.raises(ValueError, match="f has strides"):
        cpu.step(cpu_state(z), z.contiguous(), z, step(0))
