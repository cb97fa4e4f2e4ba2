"""The configurations that come with the package, at the size of a test; skips where mmdet is not installed."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="mmdet is not installed: integrations/README.md says how")
# A binary that does not fit this torch is an error, not a reason to skip.
pytest.importorskip("mmcv._ext", reason="mmcv has no compiled operators: see there", exc_type=ModuleNotFoundError)

from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs, demo_track_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MessageHub

from ifr_fast import Broyden, IFRHead, Implicit
from ifr_fast.integrations.mmdet import CONFIGS, IFRTowers

# mmdet's, mmengine's and what they depend on: none is about this package.
QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]
register_all_modules()
SYSTEMS = sorted(path.stem for path in CONFIGS.glob("ifr-*.py"))
# Untrained weights score low everywhere; and fewer proposals, RoIs and detections, coarser grids for SOLO.
LIMITS = {"score_thr": 0.0, "filter_thr": 0.0, "mask_thr": 1e-6, "max_per_img": 8, "num": 32}
LIMITS |= {"num_grids": [20, 18, 12, 8, 6]}


def config(system: str) -> Config:
    """The shipped configuration of this name."""
    return Config.fromfile(CONFIGS / f"{system}.py")


def base_config(system: str) -> Config:
    """mmdet's configuration that it inherits."""
    (base,) = re.findall(r'"(mmdet::.+?)"', (CONFIGS / f"{system}.py").read_text())
    return get_config(base)


def parts(config: object) -> Iterator[ConfigDict]:
    """Every dict inside a configuration, at any depth."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list | tuple) else ():
        yield from parts(value)
    if isinstance(config, ConfigDict):
        yield config


def build(config: Config) -> nn.Module:
    """The detector: weights drawn rather than downloaded, thresholds lowered, solves cut short."""
    for part in parts(config.model):
        part.update({name: value for name, value in LIMITS.items() if name in part})
        if isinstance(part.get("init_cfg"), dict) and part.init_cfg.type == "Pretrained":
            part.init_cfg = None
    model = MODELS.build(config.model)
    model.init_weights()
    for head in model.modules():
        if isinstance(head, IFRHead):
            head.solver, head.adjoint = Broyden(max_iter=5), Implicit(max_iter=5)
    MessageHub.get_current_instance().update_info("iter", 1)  # BoxInst's loss asks for it
    return model


def refined(model: nn.Module) -> dict[str, IFRTowers]:
    """The heads with IFR in a detector, by path."""
    return {path: head for path, head in model.named_modules() if isinstance(head, IFRTowers)}


def inputs(system: str) -> dict:
    """A batch of one or two random images of 128×128 with boxes and masks, as a data loader gives it."""
    if "masktrack" in system:
        batch = demo_track_inputs(num_frames=2, key_frames_inds=[0], num_classes=40, with_mask=True)
        batch["inputs"] = [torch.randint(256, frames.shape, dtype=torch.uint8) for frames in batch["inputs"]]
        return batch
    semantic = {"with_semantic": True, "sem_seg_output_strides": 8} if "htc" in system else {}
    batch = demo_mm_inputs(2, num_items=[4, 4], num_classes=80, with_mask=True, **semantic)
    batch["inputs"] = [torch.randint(256, image.shape, dtype=torch.uint8) for image in batch["inputs"]]
    for sample in batch["data_samples"]:
        sample.set_metainfo({"batch_input_shape": (128, 128), "pad_shape": (128, 128)})
    return batch
