"""Heads laid out as in AdelaiDet.

Written anew, small: what they share with the originals is the names and kinds of containers, what each layer holds,
and the way `forward` walks them. Losses, and what needs boxes, are left out.
"""

import torch
from detectron2_layouts import C, Conv2d
from torch import nn
from torch.nn import functional as F


class ModuleListDial(nn.ModuleList):
    """AdelaiDet's FCOS: one norm for each level in turn."""

    def __init__(self, modules=None):
        super().__init__(modules)
        self.cur_position = 0

    def forward(self, x):
        result = self[self.cur_position](x)
        self.cur_position += 1
        if self.cur_position >= len(self):
            self.cur_position = 0
        return result


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


class ModulatedDeformConv(nn.Module):
    """Weights of its own; torchvision's operator does the work."""

    def __init__(self, channels=C):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / 10)

    def forward(self, x, offset, mask):
        return torch.ops.torchvision.deform_conv2d(
            x, self.weight, offset, mask, x.new_zeros(len(self.weight)), 1, 1, 1, 1, 1, 1, 1, 1, True
        )


class DFConv2d(nn.Module):
    """AdelaiDet's deformable convolution: an ordinary one for the offsets beside it."""

    def __init__(self, channels_in, channels_out, kernel_size=3, stride=1, padding=1, bias=False):
        super().__init__()
        self.offset = Conv2d(channels_in, 27, kernel_size=kernel_size, stride=stride, padding=padding)
        self.conv = ModulatedDeformConv(channels_out)

    def forward(self, x, return_offset=False):
        offset_mask = self.offset(x)
        x = self.conv(x, offset_mask[:, :18], offset_mask[:, 18:].sigmoid())
        return (x, offset_mask) if return_offset else x


def adelaidet_tower(convs, norm, levels, deformable):
    """FCOSHead's and MEInstHead's loop."""
    tower = []
    for i in range(convs):
        conv = DFConv2d if deformable == "all" or (deformable == "last" and i == convs - 1) else nn.Conv2d
        tower.append(conv(C, C, kernel_size=3, stride=1, padding=1, bias=True))
        if norm == "GN":
            tower.append(nn.GroupNorm(4, C))
        elif norm == "BN":
            tower.append(ModuleListDial([nn.BatchNorm2d(C) for _ in range(levels)]))
        tower.append(nn.ReLU())
    return nn.Sequential(*tower)


class FCOSHead(nn.Module):
    """AdelaiDet's; the shared tower is empty by default."""

    def __init__(self, norm="GN", deformable=None, shared=0):
        super().__init__()
        for head, convs in (("cls", 4), ("bbox", 4), ("share", shared)):
            self.add_module(f"{head}_tower", adelaidet_tower(convs, norm, 2, deformable))
        self.cls_logits = nn.Conv2d(C, 6, kernel_size=3, stride=1, padding=1)
        self.bbox_pred = nn.Conv2d(C, 4, kernel_size=3, stride=1, padding=1)
        self.ctrness = nn.Conv2d(C, 1, kernel_size=3, stride=1, padding=1)
        self.scales = nn.ModuleList([Scale() for _ in range(2)])

    def forward(self, x, top_module=None, yield_bbox_towers=True):
        logits = []
        bbox_reg = []
        ctrness = []
        top_feats = []
        bbox_towers = []
        for l, feature in enumerate(x):  # noqa: E741
            feature = self.share_tower(feature)
            cls_tower = self.cls_tower(feature)
            bbox_tower = self.bbox_tower(feature)
            if yield_bbox_towers:
                bbox_towers.append(bbox_tower)
            logits.append(self.cls_logits(cls_tower))
            ctrness.append(self.ctrness(bbox_tower))
            reg = self.bbox_pred(bbox_tower)
            if self.scales is not None:
                reg = self.scales[l](reg)
            bbox_reg.append(F.relu(reg))
            if top_module is not None:
                top_feats.append(top_module(bbox_tower))
        return logits, bbox_reg, ctrness, top_feats, bbox_towers


class MEInstHead(FCOSHead):
    """AdelaiDet's: FCOSHead with a tower for the masks' codes."""

    def __init__(self, deformable=None):
        super().__init__(deformable=deformable)
        self.add_module("mask_tower", adelaidet_tower(4, "GN", 2, deformable))
        self.mask_pred = nn.Conv2d(C, 10, kernel_size=3, stride=1, padding=1)

    def forward(self, x):
        mask_reg = []
        for feature in x:
            feature = self.share_tower(feature)
            mask_tower = self.mask_tower(feature)
            mask_reg.append(self.mask_pred(mask_tower))
        return super().forward(x), mask_reg


def conv_block(channels_in=C, channels_out=C):
    """AdelaiDet's conv_with_kaiming_uniform: a Sequential of each convolution, its norm and ReLU."""
    conv = Conv2d(channels_in, channels_out, kernel_size=3, stride=1, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class MaskBranch(nn.Module):
    """AdelaiDet's CondInst and BoxInst. The levels' `refine` is as wide as the tower, and no tower."""

    def __init__(self):
        super().__init__()
        self.in_features = ["p3", "p4", "p5"]
        self.refine = nn.ModuleList()
        for _ in self.in_features:
            self.refine.append(conv_block())
        tower = [conv_block() for _ in range(4)]
        tower.append(nn.Conv2d(C, 3, 1))
        self.add_module("tower", nn.Sequential(*tower))
        self.seg_head = nn.Sequential(conv_block(), conv_block())
        self.logits = nn.Conv2d(C, 6, kernel_size=1, stride=1)

    def forward(self, features):
        for i, f in enumerate(self.in_features):
            if i == 0:
                x = self.refine[i](features[f])
            else:
                x_p = self.refine[i](features[f])
                x = x + F.interpolate(x_p, x.size()[2:], mode="bilinear", align_corners=False)
        mask_feats = self.tower(x)
        return mask_feats, self.logits(self.seg_head(features[self.in_features[0]]))


class ProtoNet(MaskBranch):
    """AdelaiDet's BlendMask: a resize, and one more convolution, inside the tower."""

    def __init__(self):
        super().__init__()
        tower = [conv_block() for _ in range(3)]
        tower.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        tower.append(conv_block())
        tower.append(nn.Conv2d(C, 3, 1))
        self.add_module("tower", nn.Sequential(*tower))
