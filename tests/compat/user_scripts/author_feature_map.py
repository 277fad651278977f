"""Coloured images, two classes at a time, under a frozen convolution: the whole encoder, as its users call it."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from key_value_bottleneck.core import BottleneckedEncoder
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
colours = F.normalize(torch.randn(4, 3))[:, :, None, None]


def images(labels):
    return 2 * colours[labels] + 0.3 * torch.randn(len(labels), 3, 8, 6)


unlabelled = DataLoader(TensorDataset(images(torch.randint(4, (256,))), torch.zeros(256)), batch_size=64)
model = BottleneckedEncoder(
    nn.Conv2d(3, 12, 3, padding=1),
    num_channels=12,
    num_codebooks=8,
    key_value_pairs_per_codebook=64,
    dim_keys=5,
    dim_values=4,
    splitting_mode="random_projection",
    threshold_ema_dead_code=0.1,
    encoder_is_channel_last=False,
    return_values_only=False,
)
model = model.prepare(loader=unlabelled, epochs=3)
model.bottleneck.reset_cluster_size_counter()
model.bottleneck.values = nn.Parameter(torch.zeros_like(model.bottleneck.values))
frozen = model.bottleneck.keys.clone()


def vote(values):
    return values.permute(0, 1, 2, 4, 5, 3).reshape(len(values), -1, 4).mean(1)


optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
for task in ([0, 1], [2, 3]):
    model.activate_counts()
    for _ in range(60):
        labels = torch.tensor(task)[torch.randint(2, (32,))]
        values, keys, indices, distances, counts, heads, features = model(images(labels))
        loss = F.cross_entropy(vote(values), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.deactivate_counts()
model.eval()
labels = torch.arange(4).repeat(50)
with torch.no_grad():
    values, keys, indices, distances, counts, heads, features = model(images(labels))
accuracy = (vote(values).argmax(-1) == labels).float().mean().item()
unused = model.fraction_of_unused_keys().item()
print(f"accuracy {accuracy:.3f} on all four classes, {unused:.2f} of the keys unused")
