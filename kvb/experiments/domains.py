"""Data for domain-incremental learning: every task has all classes, and shows them in another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvb.experiments.class_incremental import Examples

ANGLES = (0, 20, 40, 60, 80)  # degrees that images are turned by; from 180 on a 6 would be a 9


class Domains(NamedTuple):
    """Examples whose labels name a class and a domain; the labels of each domain, and the class of every label."""

    train: Examples
    test: Examples
    labels: tuple[Tensor, ...]
    classes: Tensor


def turned(images: Tensor, labels: Tensor, num_classes: int, angles: Sequence[float] = ANGLES) -> tuple[Tensor, Tensor]:
    """Each image [N, 1, H, W] turned by one of the angles, always the same, and ``domain * num_classes + class``."""
    domain = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)) % len(angles)
    angle = torch.tensor([math.radians(degrees) for degrees in angles])[domain]
    cosine, sine, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([torch.stack([cosine, -sine, none], -1), torch.stack([sine, cosine, none], -1)], 1)
    grid = nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False), domain * num_classes + labels


def of_angles(train: Examples, test: Examples, num_classes: int) -> Domains:
    """What ``turned`` made, split: a domain for every angle."""
    everything = torch.arange(len(ANGLES) * num_classes)
    return Domains(train, test, everything.split(num_classes), everything % num_classes)
