"""Inputs that resemble RoI features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_features(n: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """(n, channels, size, size) like RoI features: low-passed noise through a ReLU, rms 1."""
    noise = torch.randn(n, channels, size + 4, size + 4, generator=generator, device=generator.device)
    features = F.avg_pool2d(noise, 5, stride=1).relu()
    return features / features.square().mean().sqrt()
