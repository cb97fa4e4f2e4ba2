"""WarmupUnroll: training passes unroll for so many iterations, evaluation always solves, and checkpoints go on."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ifr_fast import IFRHead, Unroll, WarmupUnroll


@pytest.fixture
def x():
    return torch.randn(2, 16, 5, 5)


def unrolls(head, x):
    head(x)
    return head.last_solution is None


def test_unrolls_then_solves(x, make_head):
    model = torch.nn.Sequential(make_head(16), torch.nn.ReLU(), make_head(16))
    unrolled = make_head(16, solver=Unroll(2))
    unrolled.load_state_dict(model[0].state_dict())
    warmup = WarmupUnroll(model, steps=3, unroll=2)
    for iteration in range(5):
        model.train()
        assert [unrolls(model[0], x), unrolls(model[2], x)] == [iteration < 3] * 2
        assert torch.equal(model[0](x), unrolled(x)) == (iteration < 3)
        model.eval()
        assert not unrolls(model[0], x)
        warmup.step()


def test_solve_ignores_the_warmup(x, make_head):
    head = make_head(16)
    WarmupUnroll(head)
    z = head.solve(x)
    assert head.last_solution is not None
    assert torch.equal(z, head.eval()(x))


def test_goes_on_from_a_checkpoint(x, make_head):
    head = make_head(16)
    warmup = WarmupUnroll(head, steps=3)
    warmup.step()
    warmup.step()
    resumed = WarmupUnroll(make_head(16), steps=3)
    resumed.load_state_dict(copy.deepcopy(warmup.state_dict()))
    for schedule in (warmup, resumed):
        assert unrolls(schedule.heads[0], x)
        schedule.step()
        assert not unrolls(schedule.heads[0], x)
    warmup.load_state_dict({"count": 0})
    assert unrolls(head, x)


def test_checkpoints_of_heads_that_counted_themselves_still_load(make_head):
    model = torch.nn.Sequential(make_head(16))
    state = {**model.state_dict(), "0.warmup_count": torch.tensor(7)}
    assert not any(model.load_state_dict(state))
    assert state["0.warmup_count"] == 7
    assert make_head(16).state_dict().keys() == {key.removeprefix("0.") for key in model.state_dict()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_what_was_done(reentrant, make_head):
    head = make_head(16)
    plain = copy.deepcopy(head)
    schedules = [WarmupUnroll(h, steps=2, unroll=2) for h in (head, plain)]
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    for iteration in range(4):
        for h in (head, plain):
            h.zero_grad()
            outputs = [checkpoint(h, x, use_reentrant=reentrant) if h is head else h(x) for _ in range(2)]
            sum(y.square().sum() for y in outputs).backward()
            assert (h.last_solution is None) == (iteration < 2)
        for own, other in zip(head.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)
        for schedule in schedules:
            schedule.step()


def test_an_average_solves_while_the_model_unrolls(x, make_head):
    head = make_head(16)
    warmup = WarmupUnroll(head, steps=2)
    average = AveragedModel(head)
    assert unrolls(head, x)
    assert not unrolls(average.module.eval(), x)
    warmup.step()
    average.update_parameters(head)


def test_copies_take_no_part(x, make_head):
    """Else one made during the warm-up would unroll for ever: the schedule knows the model it was given."""
    head = make_head(16)
    WarmupUnroll(head)
    assert unrolls(head, x)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), AveragedModel(head).module):
        assert not unrolls(other.train(), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WarmupUnroll(IFRHead(8, groups=2), steps=-1), r"WarmupUnroll\(steps=-1\)"),
        (lambda: WarmupUnroll(IFRHead(8, groups=2), unroll=0), r"WarmupUnroll\(unroll=0\)"),
        (lambda: WarmupUnroll(torch.nn.ReLU()), "model is a ReLU without an IFRHead"),
        (lambda: WarmupUnroll([IFRHead(8, groups=2)]), "model is a list: expected a module"),
        (lambda: WarmupUnroll(IFRHead(8, groups=2)).load_state_dict({"count": "2"}), "expected what WarmupUnroll"),
        (lambda: WarmupUnroll(IFRHead(8, groups=2)).load_state_dict(None), "expected what WarmupUnroll"),
    ],
)
def test_bad_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()
