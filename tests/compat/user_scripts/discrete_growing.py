"""Songs by genre, one task after the other: the table of values is exchanged for a wider one before each."""

import torch
import torch.nn as nn
from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck

torch.manual_seed(0)
genres = 2 * torch.randn(6, 32)
encoder = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
model = DiscreteKeyValueBottleneck(
    dim=8,
    dim_embed=32,
    num_memories=64,
    num_memory_codebooks=8,
    dim_memory=2,
    codebook_dim=8,
    encoder=encoder,
    kmeans_init=True,
    threshold_ema_dead_code=1,
)


def songs(labels):
    return genres[labels][:, None] + 0.2 * torch.randn(len(labels), 5, 32)


for _ in range(20):
    model(songs(torch.randint(6, (64,))))
model.vq.eval()
frozen = model.vq._codebook.embed.clone()
del model.values
model.values = nn.Parameter(torch.zeros(8, 64, 0))
for task in range(3):
    known = model.values.detach()
    model.values = nn.Parameter(torch.cat([known, torch.zeros(8, 64, 2)], -1))
    optimizer = torch.optim.SGD([model.values], lr=30.0)
    for _ in range(40):
        labels = 2 * task + torch.randint(2, (32,))
        logits = model(songs(labels)).mean(1)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

labels = torch.arange(6).repeat(40)
logits = model.eval()(songs(labels)).mean(1)
accuracy = (logits.argmax(-1) == labels).float().mean().item()
again = DiscreteKeyValueBottleneck(
    dim=8, dim_embed=32, num_memories=64, num_memory_codebooks=8, dim_memory=6, codebook_dim=8, encoder=encoder
)
again.load_state_dict(model.state_dict())
print(f"accuracy {accuracy:.3f} on {logits.shape[-1]} genres")
