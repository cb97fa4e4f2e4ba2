"""Modules that hold a list of convolutions and walk it, or do not."""

from torch import nn


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.others = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.number, self.at = 4, 2
        self.relu, self.gelu = nn.ReLU(), nn.GELU()


class Plain(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


class OneForEachLevel(Owner):
    def forward(self, x):
        return [self.convs[i](x[i]) for i in range(4)]
