"""Patches of a feature map: memories of every codebook under a linear head, with the commitment loss."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck

torch.manual_seed(0)
patterns = torch.randn(3, 12)


def patches(labels):
    return patterns[labels][:, None] + 0.4 * torch.randn(len(labels), 9, 12)


model = DiscreteKeyValueBottleneck(
    12,
    num_memories=16,
    num_memory_codebooks=4,
    dim_memory=6,
    average_pool_memories=False,
    codebook_dim=12,
    kmeans_init=True,
    kmeans_iters=5,
    threshold_ema_dead_code=2,
)
head = nn.Linear(4 * 6, 3)
optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
for _ in range(80):
    labels = torch.randint(3, (32,))
    memories, (quantized, indices, commit_loss) = model(patches(labels), return_intermediates=True)
    features = memories.permute(0, 2, 1, 3).reshape(len(labels), 9, 24)
    loss = F.cross_entropy(head(features).mean(1), labels) + commit_loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
frozen = model.vq._codebook.embed.clone()
labels = torch.arange(3).repeat(50)
memories, (quantized, indices, commit_loss) = model(patches(labels), return_intermediates=True)
features = memories.permute(0, 2, 1, 3).reshape(len(labels), 9, 24)
accuracy = (head(features).mean(1).argmax(-1) == labels).float().mean().item()
print(f"accuracy {accuracy:.3f} on all three classes")
