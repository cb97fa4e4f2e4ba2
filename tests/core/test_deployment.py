"""Export, packages, traces, compilation, counters, copies: what people do to a trained head."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Shine, Unroll, Unrolled

SIZE = 8 * 5 * 4


@pytest.fixture
def x():
    return torch.randn(3, 8, 5, 4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(solver=Unroll(2)), dict(solver="anderson"), dict(adjoint=Shine()), dict(form="plain")],
    ids=str,
)
def test_export_with_a_dynamic_batch(options, strict, x, make_head):
    head = make_head(8, groups=2, **options).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(head, (x,), dynamic_shapes=({0: batch},), strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for n in (1, 3, 6):
            x = torch.randn(n, 8, 5, 4)
            torch.testing.assert_close(loaded(x), head(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, dict(solver=Unroll(2)), dict(adjoint=Shine())], ids=str)
def test_jit_trace(options, grad, x, make_head):
    head = make_head(8, groups=2, **options).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(head, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        x = torch.randn(5, 8, 5, 4, requires_grad=grad)
        y, expected = torch.jit.load(file)(x), head(x)
    torch.testing.assert_close(y, expected)
    if grad:
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (torch.jit.script, "IFRHead cannot be compiled by torch.jit.script"),
        (torch.fx.symbolic_trace, "IFRHead has no graph for torch.fx.symbolic_trace"),
    ],
)
def test_what_cannot_take_a_head_says_so(tool, words, make_head):
    with pytest.raises(NotImplementedError, match=words):
        tool(nn.Sequential(make_head(8, groups=2)))


def test_an_altered_block_is_not_traced(x, make_head):
    head = make_head(8, groups=2, weight_norm=False).eval()
    head.block.conv1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cannot be traced"):
        torch.jit.trace(head, x)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cannot be traced"):
        torch.export.export(head, (x,), strict=False)
    with pytest.raises(Exception, match="altered"):
        torch.compile(head, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(torch.compile(head, backend="eager")(x), head(x))


@pytest.mark.parametrize("options", [{}, dict(adjoint=Unrolled(), solver=Broyden(3))], ids=str)
def test_compiled_checkpoints(options, x, make_head):
    head = make_head(8, groups=2, **options)
    step = torch.compile(lambda x: checkpoint(head, x, use_reentrant=False) * 2, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    actual, expected = step(x), 2 * head(x)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), [x, *head.parameters()]) for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_heads_alike_share_one_compilation(x, make_head):
    counter = CompileCounter()
    for _ in range(4):
        head = torch.compile(make_head(8, groups=2), backend=counter, fullgraph=True)
        for _ in range(2):
            head(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("solver", [Broyden(6, rtol=0.0), Anderson(6, rtol=0.0), Broyden(20, rtol=1e-2)], ids=str)
@pytest.mark.parametrize("adjoint", [Implicit(4, rtol=0.0), JacobianFree(), Phantom(3), Unrolled()], ids=str)
def test_flop_counters_see_every_evaluation(solver, adjoint, x, make_head):
    head = make_head(8, groups=2, mid_channels=4, solver=solver, adjoint=adjoint, post_gain=0.3)
    x.requires_grad_()
    f = 2 * 2 * 9 * 4 * SIZE  # two convolutions 8 → 4 → 8 of a sample
    with FlopCounterMode(display=False) as forward:
        y = head(x)
    if isinstance(adjoint, Unrolled):
        evaluations = 3 * (len(head.last_solution.trace))
    else:
        evaluations = int(head.last_solution.iterations.sum()) + 3
    assert forward.get_total_flops() == f * evaluations
    if solver.rtol == 0:
        assert evaluations == 3 * 7
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    if not isinstance(adjoint, Unrolled):
        # F again, its gradients in its input and its parameters; Implicit's steps beside.
        per_sample = 3 + 4 if isinstance(adjoint, Implicit) else 9 if isinstance(adjoint, Phantom) else 3
        assert backward.get_total_flops() == 3 * f * per_sample


def fold(head):
    for conv in (head.block.conv1, head.block.conv2):
        parametrize.remove_parametrizations(conv, "weight")


def swap(head):
    fold(head)
    for conv in (head.block.conv1, head.block.conv2):
        nn.utils.parametrizations.weight_norm(conv, dim=0)


def half_folded(head):
    parametrize.remove_parametrizations(head.block.conv1, "weight")


def freeze(head):
    head.block.conv1.requires_grad_(False)
    head.eval()


def exchange(head):
    head.block.conv1 = nn.Conv2d(8, 8, 3, padding=1, dilation=1)


STATES = [lambda head: None, fold, swap, half_folded, freeze, exchange]


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("change", STATES, ids=["as made", "folded", "swapped", "half folded", "frozen", "exchanged"])
def test_copies_and_pickles_in_every_state(change, weight_norm, x, make_head):
    head = make_head(8, groups=2, weight_norm=weight_norm, post_gain=0.3)
    if weight_norm or change not in (fold, swap, half_folded):
        change(head)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    others = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False)]
    others.append(copy.copy(head))
    for other in others:
        assert torch.equal(other(x), head(x))
        assert other.training == head.training
        assert other.state_dict().keys() == head.state_dict().keys()
        mine, theirs = ({name: p.requires_grad for name, p in h.named_parameters()} for h in (head, other))
        assert mine == theirs
        if other is not others[-1]:
            with torch.no_grad():
                for p in other.parameters():
                    p += 0.1  # which must not reach the original
            assert not torch.equal(other(x), head(x))


def test_torchs_old_names_of_weight_norm_load(x, make_head):
    head, other = make_head(8, groups=2), make_head(8, groups=2)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = head.state_dict()
    for new, old in names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    assert sum("weight_g" in key for key in state) == 2
    other.load_state_dict(state)
    assert torch.equal(other(x), head(x))


def test_the_compiler_is_not_imported_unasked():
    code = "import ifr_fast, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_state_saved_in_inference_mode(x, make_head):
    head = make_head(8, groups=2)
    head(x)
    with torch.inference_mode():
        state = head.state_dict()
    other = make_head(8, groups=2)
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other.eval()(x), head.eval()(x))
    with torch.inference_mode():
        made_there = make_head(8, groups=2)
        assert made_there(x).shape == x.shape


def test_initialisation_after_construction(x, make_head):
    """As ResidualBlock's docstring says: assign a weight that is parametrised; in place without weight norm."""
    for weight_norm in (True, False):
        head = make_head(8, groups=2, weight_norm=weight_norm)
        before, weight = head(x), torch.randn(8, 8, 3, 3)
        if weight_norm:
            head.block.conv1.weight = weight
        else:
            head.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None)
            weight = torch.zeros(8, 8, 3, 3)
        torch.testing.assert_close(head.block.conv1.weight, weight)
        assert not torch.equal(head(x), before)


def test_the_docstring_says_how_to_initialise():
    assert "conv.weight = tensor" in type(IFRHead(8, groups=2).block).__doc__
