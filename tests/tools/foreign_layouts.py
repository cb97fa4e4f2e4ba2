"""Heads laid out as in detectron2, AdelaiDet, BMask R-CNN and mmdet 1.

Written anew, small: what they share with the originals is the names and kinds of containers, what each layer holds,
and the way `forward` walks them. Losses, and what needs boxes, are left out.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

C = 8


class Conv2d(nn.Conv2d):
    """detectron2.layers.Conv2d: applies its own norm and activation."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if not torch.jit.is_scripting() and x.numel() == 0 and self.training:
            assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def conv2d(channels_in=C, channels_out=C, norm="GN", activation=F.relu, **kwargs):
    """A 3×3 Conv2d as detectron2's heads build it."""
    norm = nn.GroupNorm(4, channels_out) if norm else None
    return Conv2d(
        channels_in, channels_out, 3, padding=1, bias=norm is None, norm=norm, activation=activation, **kwargs
    )


class FrozenBatchNorm2d(nn.Module):
    """detectron2's: constants, and a class of its own."""

    def __init__(self, channels=C):
        super().__init__()
        self.register_buffer("weight", torch.full((channels,), 2.0))
        self.register_buffer("bias", torch.zeros(channels))

    def forward(self, x):
        return x * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class CycleBatchNormList(nn.ModuleList):
    """detectron2's RetinaNet: one BatchNorm for each level in turn, one affine map for all."""

    def __init__(self, length, channels):
        super().__init__(nn.BatchNorm2d(channels, affine=False) for _ in range(length))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self._pos = 0

    def forward(self, x):
        ret = self[self._pos](x)
        self._pos = (self._pos + 1) % len(self)
        return ret * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


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


class BaseMaskRCNNHead(nn.Module):
    """detectron2's."""

    def forward(self, x):
        return {"loss_mask": self.layers(x)}

    def layers(self, x):
        raise NotImplementedError


class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):
    """detectron2's: a Sequential that walks itself, and a list of its convolutions that only __init__ reads."""

    def __init__(self, channels_in=C, norm="GN"):
        super().__init__()
        self.conv_norm_relus = []
        for k in range(4):
            conv = conv2d(C if k else channels_in, norm=norm, activation=nn.ReLU())
            self.add_module(f"mask_fcn{k + 1}", conv)
            self.conv_norm_relus.append(conv)
        self.deconv = nn.ConvTranspose2d(C, C, kernel_size=2, stride=2)
        self.add_module("deconv_relu", nn.ReLU())
        self.predictor = Conv2d(C, 3, kernel_size=1)
        for layer in [*self.conv_norm_relus, self.deconv]:
            nn.init.kaiming_normal_(layer.weight)

    def layers(self, x):
        for layer in self:
            x = layer(x)
        return x


class MaskHeadThatWalksItsList(MaskRCNNConvUpsampleHead):
    """A subclass of it that somebody wrote: the list is read after all."""

    def layers(self, x):
        for layer in self.conv_norm_relus:
            x = layer(x)
        return self.predictor(self.deconv_relu(self.deconv(x)))


class FastRCNNConvFCHead(nn.Sequential):
    """detectron2's, since 0.2."""

    def __init__(self):
        super().__init__()
        self.conv_norm_relus = []
        for k in range(4):
            conv = conv2d(activation=nn.ReLU())
            self.add_module(f"conv{k + 1}", conv)
            self.conv_norm_relus.append(conv)
        self.fcs = []
        for k, size in enumerate((C * 7 * 7, 16)):
            if k == 0:
                self.add_module("flatten", nn.Flatten())
            fc = nn.Linear(size, 16)
            self.add_module(f"fc{k + 1}", fc)
            self.add_module(f"fc_relu{k + 1}", nn.ReLU())
            self.fcs.append(fc)

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class FirstFastRCNNConvFCHead(nn.Module):
    """detectron2's of 0.1: forward walks plain lists."""

    def __init__(self):
        super().__init__()
        self.conv_norm_relus = []
        for k in range(4):
            conv = conv2d()
            self.add_module(f"conv{k + 1}", conv)
            self.conv_norm_relus.append(conv)
        self.fcs = []
        for k, size in enumerate((C * 7 * 7, 16)):
            fc = nn.Linear(size, 16)
            self.add_module(f"fc{k + 1}", fc)
            self.fcs.append(fc)

    def forward(self, x):
        for layer in self.conv_norm_relus:
            x = layer(x)
        if len(self.fcs):
            if x.dim() > 2:
                x = torch.flatten(x, start_dim=1)
            for layer in self.fcs:
                x = F.relu(layer(x))
        return x


class KRCNNConvDeconvUpsampleHead(nn.Module):
    """detectron2's keypoint head of 0.1: a plain list, the activation outside."""

    def __init__(self):
        super().__init__()
        self.blocks = []
        for k in range(4):
            module = Conv2d(C if k else 4, C, 3, padding=1)
            self.add_module(f"conv_fcn{k + 1}", module)
            self.blocks.append(module)
        self.score_lowres = nn.ConvTranspose2d(C, 5, 4, stride=2, padding=1)
        self.up_scale = 2

    def forward(self, x):
        for layer in self.blocks:
            x = F.relu(layer(x))
        x = self.score_lowres(x)
        return F.interpolate(x, scale_factor=self.up_scale, mode="bilinear", align_corners=False)


class FPN(nn.Module):
    """detectron2's: one convolution for each level, in a plain list from the top down."""

    def __init__(self):
        super().__init__()
        self.in_features = ["p3", "p4", "p5"]
        lateral_convs, output_convs = [], []
        for name in self.in_features:
            lateral_conv, output_conv = Conv2d(C, C, kernel_size=1), conv2d()
            self.add_module(f"fpn_lateral_{name}", lateral_conv)
            self.add_module(f"fpn_output_{name}", output_conv)
            lateral_convs.append(lateral_conv)
            output_convs.append(output_conv)
        self.lateral_convs = lateral_convs[::-1]
        self.output_convs = output_convs[::-1]

    def forward(self, features):
        results = []
        prev_features = self.lateral_convs[0](features[self.in_features[-1]])
        results.append(self.output_convs[0](prev_features))
        for idx, (lateral_conv, output_conv) in enumerate(zip(self.lateral_convs, self.output_convs, strict=True)):
            if idx > 0:
                top_down_features = F.interpolate(prev_features, scale_factor=2.0, mode="nearest")
                prev_features = lateral_conv(features[self.in_features[-idx - 1]]) + top_down_features
                results.insert(0, output_conv(prev_features))
        return results


class RetinaNetHead(nn.Module):
    """detectron2's."""

    def __init__(self, norm=None, num_features=2):
        super().__init__()
        self._num_features = num_features
        subnets = {"cls": [], "bbox": []}
        for _ in range(4):
            for subnet in subnets.values():
                subnet.append(nn.Conv2d(C, C, kernel_size=3, stride=1, padding=1))
                if norm:
                    subnet.append(norm(C))
                subnet.append(nn.ReLU())
        self.cls_subnet = nn.Sequential(*subnets["cls"])
        self.bbox_subnet = nn.Sequential(*subnets["bbox"])
        self.cls_score = nn.Conv2d(C, 6, kernel_size=3, stride=1, padding=1)
        self.bbox_pred = nn.Conv2d(C, 4, kernel_size=3, stride=1, padding=1)

    def forward(self, features):
        assert len(features) == self._num_features
        logits = []
        bbox_reg = []
        for feature in features:
            logits.append(self.cls_score(self.cls_subnet(feature)))
            bbox_reg.append(self.bbox_pred(self.bbox_subnet(feature)))
        return logits, bbox_reg


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


class BoundaryPreservingHead(nn.Module):
    """BMask R-CNN's: two branches in plain lists, fused both ways."""

    def __init__(self, num_boundary_conv=2):
        super().__init__()
        self.mask_fcns = []
        for k in range(4):
            conv = conv2d()
            self.add_module(f"mask_fcn{k + 1}", conv)
            self.mask_fcns.append(conv)
        self.mask_final_fusion = conv2d()
        self.downsample = conv2d(stride=2)
        self.boundary_fcns = []
        for k in range(num_boundary_conv):
            conv = conv2d()
            self.add_module(f"boundary_fcn{k + 1}", conv)
            self.boundary_fcns.append(conv)
        self.mask_to_boundary = Conv2d(C, C, kernel_size=1, activation=F.relu)
        self.boundary_to_mask = Conv2d(C, C, kernel_size=1, activation=F.relu)
        self.mask_deconv = nn.ConvTranspose2d(C, C, kernel_size=2, stride=2, padding=0)
        self.mask_predictor = Conv2d(C, 3, kernel_size=1)
        self.boundary_deconv = nn.ConvTranspose2d(C, C, kernel_size=2, stride=2, padding=0)
        self.boundary_predictor = Conv2d(C, 3, kernel_size=1)
        for layer in self.mask_fcns + self.boundary_fcns + [self.mask_deconv, self.boundary_deconv]:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, mask_features, boundary_features):
        for layer in self.mask_fcns:
            mask_features = layer(mask_features)
        boundary_features = self.downsample(boundary_features)
        boundary_features = boundary_features + self.mask_to_boundary(mask_features)
        for layer in self.boundary_fcns:
            boundary_features = layer(boundary_features)
        mask_features = self.boundary_to_mask(boundary_features) + mask_features
        mask_features = self.mask_final_fusion(mask_features)
        mask_features = F.relu(self.mask_deconv(mask_features))
        mask_logits = self.mask_predictor(mask_features)
        boundary_features = F.relu(self.boundary_deconv(boundary_features))
        return mask_logits, self.boundary_predictor(boundary_features)


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
