"""What the second seed document leaves open: the encoder behind torch.hub.load, and five names.

The images are scikit-learn's handwritten digits, of which a frozen random network makes the features.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kvb.decoders import LinearProbe

IMAGES, CLASSES, BATCH = 512, 10, 128
args = SimpleNamespace(rate=0.5, epochs=4)


def resnet50() -> nn.Module:
    """A network with the children and the channels of a ResNet-50; every layer is one convolution."""
    torch.manual_seed(0)
    children = {
        "conv1": nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, 2, 1),
    }
    inputs = 64
    for number, outputs in enumerate((256, 512, 1024, 2048), start=1):
        children[f"layer{number}"] = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=min(number, 2)), nn.ReLU())
        inputs = outputs
    network = nn.Sequential()
    for name, child in children.items():
        network.add_module(name, child)
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    network.add_module("fc", nn.Identity())
    return network


def hub_load(repository: str, name: str, **options: object) -> nn.Module:
    """In place of ``torch.hub.load``."""
    if (repository, name) != ("facebookresearch/dino:main", "dino_resnet50"):
        raise ValueError(f"no stand-in for {repository}, {name}")
    return resnet50()


def get_your_dataloader() -> DataLoader:
    """Digits as colour images [B, 3, 32, 32] and their labels."""
    raw = load_digits()
    images = torch.from_numpy(raw.images[:IMAGES]).float()[:, None] / 16
    images = nn.functional.interpolate(images, size=(32, 32)).expand(-1, 3, -1, -1)
    return DataLoader(TensorDataset(images, torch.from_numpy(raw.target[:IMAGES]).long()), batch_size=BATCH)


class Decoder(nn.Module):
    """A linear layer on the fetched values; distances and indices are left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = LinearProbe(1024, CLASSES)

    def forward(self, output) -> Tensor:
        return self.probe(output.values)


def load_your_favorite_decoder() -> nn.Module:
    return Decoder()


def freeze_decoder_weights(model: nn.Module) -> None:
    model[1].requires_grad_(False)


trained: list[SimpleNamespace] = []  # one entry a call of ``train``: the states around it, and the losses


def train(model: nn.Module, loader: DataLoader, args: SimpleNamespace) -> None:
    """Plain SGD with cross-entropy."""

    def state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    before, losses = state(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.rate)
    for _ in range(args.epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    trained.append(SimpleNamespace(before=before, after=state(), losses=losses))
