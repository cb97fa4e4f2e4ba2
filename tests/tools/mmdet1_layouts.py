"""SipMask's head, laid out as in mmdet 1, and the layers that mmdet 1 and mmcv make heads of.

Written anew, small: what they share with the originals is the names and kinds of containers, what each layer holds,
and the way `forward` walks them. Losses, and what needs boxes, are left out.
"""

from functools import partial

import torch
from adelaidet_layouts import Scale
from detectron2_layouts import C
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d


class DeformConvPack(DeformConv2d):
    """mmcv's: the convolution for the offsets is a child of the deformable one."""

    def __init__(self, channels_in, channels_out, kernel_size, padding=0, bias=True):
        super().__init__(channels_in, channels_out, kernel_size, padding=padding, bias=bias)
        self.conv_offset = nn.Conv2d(channels_in, 2 * kernel_size**2, kernel_size, padding=padding)

    def forward(self, x):
        return super().forward(x, self.conv_offset(x))


class ConvModule(nn.Module):
    """mmdet 1's and mmcv's: convolution, norm and activation in a configured order."""

    def __init__(self, channels_in=C, channels_out=C, conv=nn.Conv2d, norm=partial(nn.GroupNorm, 4)):  # noqa: B008
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.conv = conv(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm_name = "gn"
        self.add_module(self.norm_name, norm(channels_out))
        self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate:
                x = self.activate(x)
        return x


class FeatureAlign(nn.Module):
    """SipMask's."""

    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(4, 18, 1, bias=False)
        self.conv_adaption = DeformConv2d(C, C, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.GroupNorm(4, C)

    def forward(self, x, shape):
        offset = self.conv_offset(shape.detach())
        return self.relu(self.norm(self.conv_adaption(x, offset)))


class SipMaskHead(nn.Module):
    """SipMask's, for mmdet 1: a classification tower one shorter than the other, aligned by the boxes after it."""

    def __init__(self, dcn_on_last_conv=False):
        super().__init__()
        self.stacked_convs = 4
        self._init_layers(DeformConvPack if dcn_on_last_conv else nn.Conv2d)
        self.init_weights()

    def _init_layers(self, last):
        self.cls_convs = nn.ModuleList()
        self.reg_convs = nn.ModuleList()
        for _ in range(self.stacked_convs - 1):
            self.cls_convs.append(ConvModule())
        for i in range(self.stacked_convs):
            self.reg_convs.append(ConvModule(conv=last if i == self.stacked_convs - 1 else nn.Conv2d))
        self.fcos_cls = nn.Conv2d(C, 6, 3, padding=1)
        self.fcos_reg = nn.Conv2d(C, 4, 3, padding=1)
        self.fcos_centerness = nn.Conv2d(C, 1, 3, padding=1)
        self.scales = nn.ModuleList([Scale() for _ in range(2)])
        self.feat_align = FeatureAlign()
        self.sip_cof = nn.Conv2d(C, 4, 3, padding=1)
        self.sip_mask_lat = nn.Conv2d(C, 3, 3, padding=1)
        self.sip_mask_lat0 = nn.Conv2d(2 * C, C, 1)
        self.relu = nn.ReLU(inplace=True)

    def init_weights(self):
        for m in self.cls_convs:
            nn.init.normal_(m.conv.weight, std=0.1)
        for m in self.reg_convs:
            nn.init.normal_(m.conv.weight, std=0.1)

    def forward(self, feats):
        cls_scores = []
        bbox_preds = []
        centernesses = []
        cof_preds = []
        feat_masks = []
        for count, (x, scale) in enumerate(zip(feats, self.scales, strict=True)):
            cls_feat = x
            reg_feat = x
            for cls_layer in self.cls_convs:
                cls_feat = cls_layer(cls_feat)

            for reg_layer in self.reg_convs:
                reg_feat = reg_layer(reg_feat)

            bbox_pred = scale(self.fcos_reg(reg_feat))
            cls_feat = self.feat_align(cls_feat, bbox_pred)
            cls_scores.append(self.fcos_cls(cls_feat))
            centernesses.append(self.fcos_centerness(reg_feat))
            bbox_preds.append(bbox_pred)
            cof_preds.append(self.sip_cof(cls_feat))
            feat_masks.append(F.interpolate(reg_feat, scale_factor=2**count) if count else reg_feat)
        feat_masks = torch.cat(feat_masks, dim=1)
        feat_masks = self.relu(self.sip_mask_lat(self.relu(self.sip_mask_lat0(feat_masks))))
        return cls_scores, bbox_preds, centernesses, cof_preds, feat_masks
