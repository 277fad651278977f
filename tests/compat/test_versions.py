"""Version 0.0.x of discrete_key_value_bottleneck_pytorch: contract and checkpoints; checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import kvb
from kvb import compat
from kvb.compat.convert import AccidentalProjections
from kvb.compat.discrete_key_value_bottleneck_pytorch_0_0 import DiscreteKeyValueBottleneck

pytestmark = pytest.mark.fallback

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden_seeds.pt", weights_only=True)
PACKAGE = "discrete_key_value_bottleneck_pytorch"
CASES = [name for name in GOLDEN if name.startswith(("v00", "v01", "old"))]


def make(**options):
    return DiscreteKeyValueBottleneck(8, **{"num_memories": 9, "num_memory_codebooks": 2, **options})


def test_memories_of_all_codebooks_one_after_the_other():
    module = make(codebook_dim=4, dim_memory=3).eval()
    x = torch.randn(2, 5, 8)
    memories, (quantized, indices, loss) = module(x, return_intermediates=True)
    assert memories.shape == (2, 5, 6)
    assert quantized.shape == (2, 5, 8)
    assert indices.shape == (2, 5, 2)
    assert loss == 0
    heads = (x @ module.rand_proj).unflatten(-1, (2, 4))
    for c in range(2):
        nearest = torch.cdist(heads[:, :, c], module.vq.codebook[c].expand(2, -1, -1)).argmin(-1)
        assert torch.equal(indices[..., c], nearest)
        assert torch.equal(memories[..., 3 * c : 3 * c + 3], module.values[c][nearest])
    memories.sum().backward()
    assert [name for name, part in module.named_parameters() if part.grad is not None] == ["values"]


def test_sizes_by_default():
    assert make().values.shape == (2, 9, 4)
    assert make(embed_dim=12).values.shape == (2, 9, 6)
    assert make(num_memory_codebooks=1)(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert "rand_proj" not in make(random_project_embed=False).state_dict()


class Enformer(nn.Linear):
    """Stands for the encoder of a package that was written for this version."""

    def forward(self, x, shift=0.0):
        return super().forward(x) + shift


def test_as_enformer_pytorch_builds_it():
    module = DiscreteKeyValueBottleneck(
        encoder=Enformer(3, 8), dim=8, num_memory_codebooks=4, num_memories=9, dim_memory=8 // 4, decay=0.9
    )
    head = nn.Linear(8, 5)
    head(module(torch.randn(2, 6, 3), shift=1.0)).sum().backward()
    assert not module.encoder.training
    assert module.encoder.weight.grad is None
    assert module.values.grad is not None


def test_it_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"embed_dim \(8\) must be divisible by num_memory_codebooks \(3\)"):
        make(num_memory_codebooks=3)
    with pytest.raises(ValueError, match=r"expected x of shape \(b, n, dim\) = \(b, n, 8\), got \(2, 8\)"):
        make()(torch.randn(2, 8))
    with pytest.raises(TypeError, match="average_pool_memories"):
        make(average_pool_memories=False)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_a_kvb_module_and_goes_back(name):
    case = GOLDEN[name]
    state, old = case["state"], name.startswith(("v00", "old00"))
    module = compat.module_from(state).eval()
    kind = (
        DiscreteKeyValueBottleneck if old else compat.discrete_key_value_bottleneck_pytorch.DiscreteKeyValueBottleneck
    )
    options = {key: value for key, value in case["options"].items() if "kmeans" not in key}
    replica = kind(6, **options).eval()
    replica.load_state_dict(state, strict=True)
    x = case["x"][-1]
    if not case["options"].get("use_cosine_sim"):
        memories = module(x)
        memories = memories.movedim(1, -2).flatten(-2) if old else memories
        torch.testing.assert_close(memories, replica(x), rtol=1e-6, atol=1e-6)
    back = compat.to_published(
        module.state_dict(), PACKAGE + "-0.0" * old, old_initted=state["vq._codebook.initted"].dim() == 1
    )
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())


def test_splitters_of_converted_modules():
    kinds = {name: type(compat.module_from(GOLDEN[name]["state"]).splitter) for name in CASES}
    assert kinds["v00_plain"] is kinds["v01_plain"] is kinds["v00_unprojected_mixed"] is AccidentalProjections
    assert kinds["v00_wide"] is kinds["v01_replaces"] is kvb.splitters.RandomProjection
    assert kinds["v00_unprojected"] is kvb.splitters.Chunk


def test_messages_for_checkpoints_that_cannot_be_converted():
    state = dict(GOLDEN["v00_plain"]["state"])
    for name in ("values", "vq._codebook.cluster_size"):
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=f"the state_dict of a whole DiscreteKeyValueBottleneck, {name} missing"):
            compat.module_from(part)
    shared = state | {"vq._codebook.embed": state["vq._codebook.embed"][:1]}
    with pytest.raises(ValueError, match="a codebook of keys for each of the 2 of values, got 1: versions up to 0.0.4"):
        compat.module_from(shared)
    with pytest.raises(ValueError, match="is no tensor of a checkpoint that kvb can convert"):
        compat.module_from(state | {"vq._codebook.batch_mean": torch.zeros(1)})
    with pytest.raises(ValueError, match="package must be one of"):
        compat.to_published(compat.module_from(state).state_dict(), "discrete_key_value_bottleneck_pytorch-0.2")


def test_a_file_of_the_other_version_does_not_fit_a_replica():
    with pytest.raises(RuntimeError, match="rand_proj"):
        DiscreteKeyValueBottleneck(6, **GOLDEN["v00_plain"]["options"]).load_state_dict(GOLDEN["v01_plain"]["state"])
