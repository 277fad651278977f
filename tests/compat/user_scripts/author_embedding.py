"""Embeddings in six classes, two at a time: the bottleneck alone, with the two nearest pairs, saved and loaded."""

import io

import torch
import torch.nn.functional as F
from key_value_bottleneck.core import KeyValueBottleneck

torch.manual_seed(0)
centres = 2 * torch.randn(6, 24)
options = {"num_codebooks": 8, "key_value_pairs_per_codebook": 40, "dim_keys": 3, "dim_values": 6, "topk": 2}


def embeddings(labels):
    """[b, c, n, k], with one position."""
    x = centres[labels] + 0.5 * torch.randn(len(labels), 24)
    return x.view(len(x), 8, 1, 3)


bottleneck = KeyValueBottleneck(**options, decay=0.9, threshold_ema_dead_code=0.2)
for _ in range(30):
    bottleneck(embeddings(torch.randint(6, (128,))))
bottleneck.freeze_keys()
torch.nn.init.zeros_(bottleneck.values)
frozen = bottleneck.keys.clone()

optimizer = torch.optim.SGD(bottleneck.parameters(), lr=30.0)
for task in ([0, 1], [2, 3], [4, 5]):
    for _ in range(60):
        labels = torch.tensor(task)[torch.randint(2, (64,))]
        (values,) = bottleneck(embeddings(labels))
        loss = F.cross_entropy(values.sum(2).mean((1, 2)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

file = io.BytesIO()
torch.save(bottleneck.state_dict(), file)
file.seek(0)
loaded = KeyValueBottleneck(**options, return_values_only=False)
loaded.load_state_dict(torch.load(file))
loaded.freeze_keys().deactivate_counts()
loaded.eval()

labels = torch.arange(6).repeat(50)
values, keys, indices, distances, counts = loaded(embeddings(labels))
accuracy = (values.sum(2).mean((1, 2)).argmax(-1) == labels).float().mean().item()
hits = loaded.get_cluster_size(indices)
print(f"accuracy {accuracy:.3f} on all six classes; {int((hits > 0).sum())} of {hits.numel()} pairs in use")
