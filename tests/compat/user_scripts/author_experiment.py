"""An experiment as a script drives it: the class by its backbone's name, sizes read from the module, checkpoints."""

import os
import random
import tempfile
from types import SimpleNamespace

import torch
import torch.nn as nn
from key_value_bottleneck import core as kv
from torch.utils.data import DataLoader, TensorDataset

settings = SimpleNamespace(
    backbone="convmixer",
    num_books=16,
    num_pairs=128,
    dim_key=6,
    num_classes=6,
    topk=2,
    temperature=0.05,
    batch_size=64,
    threshold_factor=0.1,
    init_epochs=3,
    epochs=8,
    seed=3,
)
random.seed(settings.seed)
torch.manual_seed(settings.seed)
means = 0.4 * torch.randn(settings.num_classes, 256)


def embeddings(labels):
    return means[labels] + 0.3 * torch.randn(len(labels), 256)


def loader(labels):
    return DataLoader(TensorDataset(embeddings(labels), labels), batch_size=settings.batch_size, shuffle=True)


class Voting(nn.Module):
    """All codebooks and positions vote for a class, with a weight for every rank."""

    def __init__(self, dim_values, topk):
        super().__init__()
        self.dim_values = dim_values
        self.register_buffer("weights", torch.ones(topk))

    def forward(self, values):
        votes = values.flatten(4) if values.dim() > 4 else values[..., None]
        return torch.einsum("bctvn,t->bv", votes, self.weights) / (votes.shape[1] * votes.shape[-1])


class Model(nn.Module):
    def __init__(self, bottlenecked_encoder, decoder):
        super().__init__()
        self.bottlenecked_encoder = bottlenecked_encoder
        self.bottlenecked_encoder.freeze_encoder()
        self.decoder = decoder

    def forward(self, x):
        return self.decoder(self.bottlenecked_encoder(x)[0])


classes = {
    name: kind
    for kind in (kv.DinoBottleneckedEncoder, kv.SLPretrainedBottleneckedEncoder, kv.ConvMixerBottleneckedEncoder)
    for name in kind.VALID_BACKBONES
}
encoder = classes[settings.backbone](
    num_codebooks=settings.num_books,
    key_value_pairs_per_codebook=settings.num_pairs,
    backbone=settings.backbone,
    extracted_layer=4,
    pool_embedding=True,
    init_mode="random",
    splitting_mode="random_projection",
    dim_values=settings.num_classes,
    dim_keys=settings.dim_key,
    decay=0.95,
    eps=1e-5,
    threshold_ema_dead_code=settings.threshold_factor * settings.batch_size / settings.num_pairs,
    concat_values_from_all_codebooks=False,
    sample_codebook_temperature=settings.temperature,
    return_values_only=False,
    topk=settings.topk,
    input_is_embedding=True,
)
unlabelled = loader(torch.randint(settings.num_classes, (1024,)))
if encoder.transforms is not None:
    unlabelled.dataset.transform = encoder.transforms
encoder = encoder.prepare(loader=unlabelled, epochs=settings.init_epochs)
encoder.reset_cluster_size_counter()
encoder.disable_update_keys()

assert encoder.num_channels == kv.ConvMixerBottleneckedEncoder.CONVMIXER_DIM_EMBEDDING
decoder = Voting(encoder.dim_values, encoder.topk)
model = Model(encoder, decoder)
model.train()
bottleneck = model.bottlenecked_encoder.bottleneck
bottleneck.values = nn.Parameter(torch.zeros_like(bottleneck.values))
bottleneck.values.requires_grad = True
model.bottlenecked_encoder.freeze_keys()
for parameter in model.decoder.parameters():
    parameter.requires_grad = False
frozen = bottleneck.keys.clone()


def evaluate(data):
    model.eval()
    model.bottlenecked_encoder.deactivate_counts()
    right = total = 0
    with torch.no_grad():
        for x, labels in data:
            _, predicted = torch.max(model(x).data, 1)
            right += (predicted == labels).sum().item()
            total += len(labels)
    model.train()
    model.bottlenecked_encoder.activate_counts()
    return right / total


tests = loader(torch.arange(settings.num_classes).repeat(40))
before = evaluate(tests)
optimizer = torch.optim.SGD(model.parameters(), lr=3.0, weight_decay=0.0)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
order = list(range(settings.num_classes))
random.shuffle(order)
with tempfile.TemporaryDirectory() as folder:
    for first in range(0, settings.num_classes, 2):
        task = loader(torch.tensor(order[first : first + 2]).repeat(100))
        for _ in range(settings.epochs):
            for x, labels in task:
                optimizer.zero_grad()
                loss = criterion(model(x), labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        torch.save(model.bottlenecked_encoder, os.path.join(folder, f"after_{first}.pt"))
    loaded = torch.load(os.path.join(folder, f"after_{first}.pt"), weights_only=False)

accuracy = evaluate(tests)
unused = float(model.bottlenecked_encoder.fraction_of_unused_keys())
strength = torch.norm(bottleneck.values, dim=-1).mean().item()
assert torch.equal(loaded.bottleneck.values, bottleneck.values)
print(f"accuracy {before:.3f} before, {accuracy:.3f} after all tasks; {unused:.2f} unused, norm {strength:.2f}")
