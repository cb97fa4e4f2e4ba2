"""integrations.mmengine: the warm-up by iteration, what is logged and when, warnings that tell what to do."""

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed: integrations/README.md says how")

from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner

from ifr_fast import Broyden, IFRHead
from ifr_fast.integrations.mmengine import IFRHook

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SOLVER = Broyden(max_iter=3)


class Pyramid(BaseModel):
    """One head on two levels; remembers its unroll and its residuals in every pass."""

    def __init__(self, head=None):
        super().__init__()
        self.tower = head or IFRHead(8, groups=4, solver=SOLVER)
        self.passes = []

    def forward(self, inputs, mode):
        outputs, residuals = [], []
        for x in (inputs, inputs[..., ::2, ::2]):
            outputs.append(self.tower(x).square().mean())
            if isinstance(self.tower, IFRHead) and self.tower.last_solution:
                residuals.append(self.tower.last_solution.residual)
        unroll = getattr(self.tower, "training_unroll", 0)
        self.passes.append((mode, unroll, residuals, bool(self.tower._forward_hooks)))
        return {"loss": sum(outputs)} if mode == "loss" else outputs

    def train_step(self, data, optim_wrapper):
        loss, logged = self.parse_losses(self(data, "loss"))
        optim_wrapper.update_params(loss)
        return logged

    def val_step(self, data):
        return self(data, "predict")


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {}


def train(model, hook, folder, iterations, **changes):
    data = torch.utils.data.DataLoader(torch.randn(64, 8, 6, 6), batch_size=2)
    runner = Runner(
        model,
        str(folder),
        train_dataloader=data,
        val_dataloader=torch.utils.data.DataLoader(torch.randn(2, 8, 6, 6), batch_size=2),
        val_evaluator=[Nothing()],
        val_cfg={},
        train_cfg={"by_epoch": False, "max_iters": iterations, "val_interval": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
        custom_hooks=[hook],
        experiment_name=folder.name,
        **changes,
    )
    runner.train()
    return runner


def passes(model, mode):
    """Of every pass: how often it was to be unrolled, and on how many levels it solved."""
    return [(unroll, len(residuals)) for passed, unroll, residuals, _ in model.passes if passed == mode]


def test_warm_up_is_counted_in_iterations(tmp_path):
    model = Pyramid()
    train(model, IFRHook(warmup_iters=3, warmup_unroll=2), tmp_path, 6)
    assert passes(model, "loss") == [(2, 0)] * 3 + [(0, 2)] * 3
    assert passes(model, "predict") == [(2, 2), (0, 2), (0, 2)]


def test_interrupted_warm_up_goes_on_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train(Pyramid(), IFRHook(warmup_iters=3), tmp_path / "first", 2)
    model = Pyramid()
    saved = str(tmp_path / "first/iter_2.pth")
    train(model, IFRHook(warmup_iters=3), tmp_path / "again", 4, resume=True, load_from=saved)
    assert passes(model, "loss") == [(4, 0), (0, 2)]


def test_logs_every_level_at_the_interval_only(tmp_path):
    model = Pyramid()
    runner = train(model, IFRHook(interval=2), tmp_path, 5)
    passes = [(residuals, listened) for mode, _, residuals, listened in model.passes if mode == "loss"]
    assert [listened for _, listened in passes] == [False, True, False, True, False]
    logged = runner.message_hub.get_scalar("train/ifr_residual").data[0]
    assert logged == pytest.approx([torch.cat(passes[i][0]).median().item() for i in (1, 3)])
    assert runner.message_hub.get_scalar("train/ifr_iterations").current() == 3
    assert 0 < runner.message_hub.get_scalar("train/ifr_spectral_radius").current() < 10


def test_unrolled_iterations_are_not_logged(tmp_path):
    runner = train(Pyramid(), IFRHook(warmup_iters=9, interval=1), tmp_path, 2)
    assert not [name for name in runner.message_hub.log_scalars if "ifr" in name]


def test_logging_changes_no_random_choice(tmp_path):
    start = Pyramid().state_dict()
    drawn = []
    for interval in (1, 9):
        model = Pyramid()
        model.load_state_dict(start)
        torch.manual_seed(0)
        train(model, IFRHook(interval=interval), tmp_path / str(interval), 3, randomness={"seed": 1})
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_logging_leaves_the_last_solution(tmp_path):
    model = Pyramid()
    train(model, IFRHook(interval=1), tmp_path, 1)
    assert torch.equal(model.tower.last_solution.residual, model.passes[-1][2][-1])


def advice(folder):
    """The warnings in the log."""
    (log,) = folder.glob("*/*.log")
    return [line for line in log.read_text().splitlines() if "WARNING - tower: " in line]


def test_unreached_equilibrium_is_warned_of_once(tmp_path):
    train(Pyramid(), IFRHook(interval=1, warn_above=1e-6), tmp_path, 3)
    (warning,) = advice(tmp_path)
    for words in ("the equilibrium is not reached", "3 iterations", "max_iter=3", "warmup_iters", "post_gain"):
        assert words in warning


def test_reached_equilibrium_is_not_warned_of(tmp_path):
    train(Pyramid(IFRHead(8, groups=4, post_gain=0.1)), IFRHook(interval=1), tmp_path, 2)
    assert not advice(tmp_path)


def test_model_without_ifr_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Pyramid has no IFRHead"):
        train(Pyramid(torch.nn.Conv2d(8, 8, 1)), IFRHook(), tmp_path, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("warmup_iters", -1), ("warmup_unroll", 0), ("interval", 0.5), ("warn_above", 0), ("warn_above", "0.1")],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=rf"IFRHook\({option}={value!r}\)"):
        IFRHook(**{option: value})
