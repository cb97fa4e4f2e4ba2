"""A Mask R-CNN small enough to train on a CPU, under mmengine's Runner; run by torchrun too."""

import json
import os
import sys
from pathlib import Path

import torch
from mmdet_systems import config, parts
from mmengine.config import Config
from mmengine.runner import Runner

CHANNELS = 32
SIZE = (128, 128)


def tiny_mask_rcnn(data: Path, images: dict[str, str], work_dir: Path, iterations: int, **changes: object) -> Config:
    """The shipped configuration with ResNet-18, 32 channels and images of 128 pixels, validated after the last
    iteration.

    data: a folder in COCO's format, annotations/instances_{train,val}.json; images: its folders of train and val.
    """
    tiny = config("ifr-mask-rcnn_r50_fpn_1x_coco")
    files = {split: str(data / f"annotations/instances_{split}.json") for split in images}
    classes = tuple(category["name"] for category in json.loads(Path(files["val"]).read_text())["categories"])
    for part in parts(tiny.model):
        widths = {"in_channels": CHANNELS, "feat_channels": CHANNELS, "out_channels": CHANNELS}
        widths |= {"conv_out_channels": CHANNELS, "fc_out_channels": 64, "num_classes": len(classes), "num": 32}
        part.update({name: value for name, value in widths.items() if name in part})
    tiny.model.backbone.update(depth=18, frozen_stages=-1, norm_eval=False, init_cfg=None)
    tiny.model.neck.in_channels = [64, 128, 256, 512]
    tiny.model.roi_head.mask_head.ifr = {"groups": 8}
    tiny.model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    tiny.model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    tiny.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)

    for split, folder in images.items():
        loader = tiny[f"{split}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.update(data_root="", ann_file=files[split], data_prefix={"img": str(data / folder)})
        loader.dataset.update(metainfo={"classes": classes})
        for part in parts(loader):
            part.update({"scale": SIZE} if "scale" in part else {})
    tiny.val_evaluator.ann_file = files["val"]
    tiny.test_cfg = tiny.test_dataloader = tiny.test_evaluator = None
    tiny.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": iterations}
    tiny.optim_wrapper = {"optimizer": {"type": "AdamW", "lr": 1e-3}, "clip_grad": {"max_norm": 5.0}}
    tiny.param_scheduler = []
    tiny.custom_hooks = [{"type": "IFRHook", "warmup_iters": 2, "interval": 2}]
    tiny.default_hooks.logger.interval = 1
    tiny.default_hooks.checkpoint.update(by_epoch=False, interval=iterations)
    tiny.work_dir = tiny.visualizer.name = str(work_dir)
    tiny.update(changes)
    return tiny


def main() -> None:
    """One of torchrun's processes: trains, and leaves its model and the name of its wrapper in the work folder."""
    # mmengine's launcher picks a GPU before it joins the others, also where it was told to use gloo.
    torch.cuda.set_device = lambda device: None
    torch.set_num_threads(1)
    data, work_dir = map(Path, sys.argv[1:])
    wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}
    parallel = {"launcher": "pytorch", "env_cfg": {"dist_cfg": {"backend": "gloo"}}, "model_wrapper_cfg": wrapper}
    runner = Runner.from_cfg(tiny_mask_rcnn(data, {"train": "train", "val": "val"}, work_dir, 4, **parallel))
    runner.train()
    state = {"wrapper": type(runner.model).__name__, "model": runner.model.module.state_dict()}
    torch.save(state, work_dir / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
