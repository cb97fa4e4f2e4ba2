"""Heads laid out as in detectron2 and in BMask R-CNN, which builds on it.

Written anew, small: what they share with the originals is the names and kinds of containers, what each layer holds,
and the way `forward` walks them. Losses, and what needs boxes, are left out.
"""

import torch
from torch import nn
from torch.nn import functional as F

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
