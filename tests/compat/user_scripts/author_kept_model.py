"""A model that is made once and read from its file ever after: k-means, a learned projection, several ranks."""

import os
import tempfile

import torch
import torch.nn as nn
from key_value_bottleneck.core import BottleneckedEncoder, Chunker, KeyValueBottleneck
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]])[:, :, None, None]


def images(labels):
    return colours[labels] + 0.2 * torch.randn(len(labels), 3, 4, 4)


labels = torch.randint(3, (256,))
data = DataLoader(TensorDataset(images(labels), labels), batch_size=64)


def build():
    return BottleneckedEncoder(
        nn.Sequential(nn.Conv2d(3, 12, 1), nn.AdaptiveAvgPool2d(1)),
        num_channels=12,
        num_codebooks=6,
        dim_keys=4,
        key_value_pairs_per_codebook=30,
        dim_values=3,
        topk=4,
        encoder_is_channel_last=False,
        splitting_mode="learned_projection",
        init_mode="kmeans",
        decay=0.9,
        kmeans_iters=5,
        threshold_ema_dead_code=0.1,
        return_values_only=False,
    )


with tempfile.TemporaryDirectory() as folder:
    model_path = os.path.join(folder, "model.pt")
    for _ in range(2):
        torch.manual_seed(1)  # the encoder's own weights are not in the file
        model = build()
        if os.path.exists(model_path):
            model.load(model_path)
        else:
            model.prepare(loader=data, epochs=1)
            model.save(model_path=model_path)
    model.save_model(model_path=os.path.join(folder, "whole.pt"))
    model = torch.load(os.path.join(folder, "whole.pt"), weights_only=False)

model.reset_cluster_size_counter()
model.disable_update_keys()
output = model(next(iter(data))[0])
assert [tuple(part.shape) for part in output[:5]] == [(64, 6, 4, size, 1, 1) for size in (3, 4, 1, 1, 1)]
torch.mean(output[0]).backward()
frozen = model.bottleneck.keys.clone()

model.bottleneck.values = nn.Parameter(torch.zeros_like(model.bottleneck.values))
optimizer = torch.optim.SGD([model.bottleneck.values], lr=10.0)
for _ in range(10):
    for x, wanted in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x)[0].sum(2).mean((1, 3, 4)), wanted).backward()
        optimizer.step()
model.deactivate_counts()
wanted = torch.arange(3).repeat(40)
accuracy = (model(images(wanted))[0].sum(2).mean((1, 3, 4)).argmax(-1) == wanted).float().mean().item()

# Their parts alone, too: a splitter and a bottleneck, by keyword.
split = Chunker(num_codebooks=64, num_channels=64 * 32, dim_keys=32)
alone = KeyValueBottleneck(
    num_codebooks=64, key_value_pairs_per_codebook=200, dim_keys=32, dim_values=64, return_values_only=False
)
values, keys, indices, distances, counts = alone(split(torch.randn(8, 3, 64 * 32)))
assert values.shape == (8, 64, 1, 3, 64)
assert indices.shape == distances.shape == counts.shape == (8, 64, 1, 3, 1)
print(f"accuracy {accuracy:.3f}, read from a file")
