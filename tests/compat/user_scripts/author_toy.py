"""Points of a plane in eight classes, two at a time: keys from uniform noise, values from almost zero, Adam."""

from copy import deepcopy

import torch
import torch.nn as nn
from key_value_bottleneck.core import BottleneckedEncoder

torch.manual_seed(0)
centres = torch.tensor([[1, 1], [3, 2], [3, 1], [2, 3], [3, 3], [1, 2], [1, 3], [2, 1]]) / 4


def points(task, count=100):
    labels = 2 * task + torch.randint(2, (count,))
    return centres[labels] + 0.035 * torch.randn(count, 2), labels


class Votes(nn.Module):
    def __init__(self, bottlenecked_encoder):
        super().__init__()
        self.bottlenecked_encoder = bottlenecked_encoder

    def forward(self, x):
        return self.bottlenecked_encoder(x)[0].sum(2).mean(1)


accuracies = []
for codebooks, pairs, mode in ((1, 400, "chunk"), (20, 40, "random_projection")):
    model = BottleneckedEncoder(
        encoder=nn.Identity(),
        num_codebooks=codebooks,
        num_channels=2,
        key_value_pairs_per_codebook=pairs,
        dim_keys=2,
        dim_values=8,
        splitting_mode=mode,
        threshold_ema_dead_code=0.01,
        return_values_only=False,
        encoder_is_channel_last=False,
        concat_values_from_all_codebooks=False,
    )
    model.bottleneck.values = nn.Parameter(0.001 * torch.randn_like(model.bottleneck.values))
    model.bottleneck.values.requires_grad = True
    network = Votes(model)
    for _ in range(150):
        network(torch.rand(100, 2))
    model.freeze_keys()
    model.disable_update_keys()
    frozen = model.bottleneck.keys.clone()

    model.reset_cluster_size_counter()
    model.activate_counts()
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    states = []
    for task in range(4):
        x, labels = points(task, 400)
        for _ in range(40):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(network(x), labels).backward()
            optimizer.step()
        states.append(deepcopy(network.state_dict()))

    network.eval()
    model.deactivate_counts()
    shown = []
    for state in states:
        network.load_state_dict(state)
        tested = [points(task) for task in range(4)]
        with torch.no_grad():
            hits = [(network(x).argmax(-1) == labels).float().mean() for x, labels in tested]
        shown.append(torch.stack(hits).mean().item())
    accuracies.append(shown)

accuracy = min(shown[-1] for shown in accuracies)
print("accuracy after each task:", *(f"{shown:.2f}" for shown in accuracies[0]), f"; worst at the end {accuracy:.3f}")
