"""Sequences of tokens under an encoder with keyword arguments: averaged memories are the logits."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck

torch.manual_seed(0)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, tokens, scale=1.0):
        return self.mix(self.embedding(tokens)) * scale


def sequences(labels):
    """Classes differ in which quarter of the vocabulary their tokens are from."""
    return labels[:, None] * 5 + torch.randint(5, (len(labels), 7))


model = DiscreteKeyValueBottleneck(
    dim=8, num_memories=64, dim_embed=16, num_memory_codebooks=4, dim_memory=4, encoder=Encoder(), decay=0.9
)
for _ in range(20):
    model(sequences(torch.randint(4, (32,))), scale=2.0)
model.vq.eval()
frozen = model.vq._codebook.embed.clone()

optimizer = torch.optim.SGD([model.values], lr=30.0)
for task in ([0, 1], [2, 3]):
    for _ in range(60):
        labels = torch.tensor(task)[torch.randint(2, (32,))]
        memories = model(sequences(labels), scale=2.0)
        loss = F.cross_entropy(memories.mean(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
labels = torch.arange(4).repeat(50)
with torch.no_grad():
    accuracy = (model(sequences(labels), scale=2.0).mean(1).argmax(-1) == labels).float().mean().item()
print(f"accuracy {accuracy:.3f} on all four classes")
