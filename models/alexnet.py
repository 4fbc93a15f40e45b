"""AlexNet for 224 x 224 images, with a repeated block of three convolutions.

features    conv(3, 64, 11, stride 4, padding 2) ReLU pool, conv(64, 192, 5, padding 2) ReLU pool,
            conv(192, 384, 3) ReLU, conv(384, 256, 3) ReLU, conv(256, 256, 3) ReLU pool,
            conv(256, 384, 3) ReLU, conv(384, 256, 3) ReLU, conv(256, 256, 3) ReLU pool
classifier  average pool to 1 x 1, dropout, linear(256, 4096) ReLU linear(4096, 4096) ReLU linear(4096, classes)

Krizhevsky, Sutskever, Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks; channels as in
Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks, https://arxiv.org/abs/1404.5997.
"""

from __future__ import annotations

import torch
from torch import nn


def conv(channels: int, filters: int, size: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, size, stride, padding), nn.ReLU(inplace=True)]


def pool() -> list[nn.Module]:
    return [nn.MaxPool2d(3, stride=2)]


class AlexNet(nn.Module):
    """(N, 3, 224, 224) images to (N, num_classes) logits; images of 127 x 127 and more fit."""

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv(3, 64, 11, stride=4, padding=2), *pool(),
            *conv(64, 192, 5, padding=2), *pool(),
            *conv(192, 384), *conv(384, 256), *conv(256, 256), *pool(),
            *conv(256, 384), *conv(384, 256), *conv(256, 256), *pool(),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.avgpool(self.features(images))
        return self.classifier(torch.flatten(maps, 1))
