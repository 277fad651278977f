"""The authors' encoders: their own numbers (tests/data/golden.pt), their layouts, files, hooks and constants."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import kvb
from kvb.compat.key_value_bottleneck import core, splitters

pytestmark = pytest.mark.fallback

GOLDEN = torch.load(Path(__file__).parents[1] / "data" / "golden.pt", weights_only=True)


@pytest.mark.parametrize("mode", ["random_projection", "chunk"])
def test_encoder(mode):
    case = GOLDEN[f"encoder_{mode}"]
    C, K, V = case["state"]["bottleneck.values"].shape
    module = core.BottleneckedEncoder(
        nn.Conv2d(3, 12, 3, padding=1),
        num_channels=12,
        num_codebooks=C,
        key_value_pairs_per_codebook=K,
        dim_keys=case["state"]["bottleneck.keys"].shape[-1],
        dim_values=V,
        splitting_mode=mode,
        encoder_is_channel_last=False,
        return_values_only=False,
    )
    module.load_state_dict(case["state"], strict=True)
    output = module.freeze_encoder().freeze_splitter().freeze_keys()(case["x"])
    assert [part.shape for part in output] == [part.shape for part in case["out"]]
    values, keys, indices, distances, counts, heads, features = output
    for part, want in ((heads, 5), (features, 6)):
        torch.testing.assert_close(part, case["out"][want], rtol=1e-5, atol=1e-5)
    for part, want in ((values, 0), (keys, 1), (indices, 2), (counts, 4)):
        assert torch.equal(part, case["out"][want])
    torch.testing.assert_close(distances, case["out"][3], rtol=1e-5, atol=1e-5 * 200)


def test_learned_projection():
    case = GOLDEN["learned_projection"]
    splitter = splitters.LearnedDownProjection(4, 12, 5)
    splitter.load_state_dict(case["state"], strict=True)
    torch.testing.assert_close(splitter(case["x"]), case["y"], rtol=1e-5, atol=1e-5)


def encoder(**options):
    sizes = (nn.Conv2d(3, 12, 3, padding=1), 12, 4, 16, 3, 6)
    return core.BottleneckedEncoder(*sizes, splitting_mode="chunk", encoder_is_channel_last=False, **options)


@pytest.mark.parametrize(
    ("network", "last", "x", "values", "concatenated"),
    [
        (nn.Conv2d(3, 12, 1), False, (2, 3, 4, 5), (2, 4, 1, 6, 4, 5), (2, 1, 24, 4, 5)),
        (nn.Linear(3, 12), True, (2, 4, 5, 3), (2, 4, 1, 20, 6), (2, 1, 20, 24)),
        (nn.Linear(3, 12), True, (2, 3), (2, 4, 1, 1, 6), (2, 1, 1, 24)),
        (nn.Linear(3, 12), False, (2, 3), (2, 4, 1, 6), (2, 1, 24)),
    ],
    ids=["channel_first", "channel_last", "embedding", "embedding_channel_first"],
)
def test_encoder_shapes(network, last, x, values, concatenated):
    for concat, shape in ((False, values), (True, concatenated)):
        module = core.BottleneckedEncoder(
            network,
            num_channels=12,
            num_codebooks=4,
            key_value_pairs_per_codebook=16,
            dim_keys=3,
            dim_values=6,
            splitting_mode="chunk",
            encoder_is_channel_last=last,
            concat_values_from_all_codebooks=concat,
        )
        got, heads, features = module(torch.randn(x))
        assert got.shape == shape
        assert heads.shape == (2, 4, features.numel() // 24, 3)
        assert torch.equal(features, network(torch.zeros(x)) * 0 + features)
        assert torch.equal(heads, module.forward_splitter(torch.zeros(x)) * 0 + heads)


def test_prepare_learns_keys_and_freezes():
    module = encoder(threshold_ema_dead_code=0.1).eval()
    before = module.bottleneck.keys.clone()
    loader = [(torch.randn(8, 3, 4, 5), None)] * 5
    assert module.prepare(loader, epochs=0, progress=False) is module
    assert torch.equal(module.bottleneck.keys, before)
    module.unfreeze_keys()
    module.prepare(loader=loader, epochs=2, inputs_extractor=lambda item: item[0], progress=False)
    assert not torch.equal(module.bottleneck.keys, before)
    assert not module.bottleneck.update_keys
    assert not module.training
    assert not any(part.requires_grad for part in module.encoder.parameters())


@pytest.mark.parametrize(
    "wrapped", [lambda x: x, lambda x: (x, 1), lambda x: [x], lambda x: {"image": x, "label": torch.zeros(8)}]
)
def test_keys_learn_from_items_of_every_kind(wrapped):
    class Takes(nn.Module):
        def forward(self, x=None, image=None):
            return (image if x is None else x).flatten(1)

    module = core.BottleneckedEncoder(Takes(), 12, 4, 16, 3, 6, splitting_mode="chunk")
    other = copy.deepcopy(module)
    batches = [torch.randn(8, 3, 4) for _ in range(3)]
    module.initialize_keys([(x, None) for x in batches], progress=False)
    other.initialize_keys(map(wrapped, batches), progress=False)
    assert torch.equal(other.bottleneck.keys, module.bottleneck.keys)
    assert (other.bottleneck.cluster_size != 1).any()


def test_published_encoder_files_go_both_ways(tmp_path):
    module, twin = encoder(), encoder()
    module.save(tmp_path / "file")
    file = torch.load(tmp_path / "file", weights_only=True)
    assert set(file) == {"bottleneck", "splitter"}
    assert set(file["bottleneck"]) == set(GOLDEN["lookup_0"]["state"])
    twin.load(tmp_path / "file")
    assert torch.equal(twin.bottleneck.values, module.bottleneck.values)


def test_files_are_named_as_published(tmp_path):
    module, twin = encoder(), encoder()
    module.save(model_path=tmp_path / "parts")
    assert twin.load(model_path=tmp_path / "parts") is twin
    assert torch.equal(twin.bottleneck.keys, module.bottleneck.keys)
    module.save_model(model_path=tmp_path / "whole")
    whole = torch.load(tmp_path / "whole", weights_only=False)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(whole.eval()(x)[0], module.eval()(x)[0])
    assert whole.bugs == module.bugs


def test_every_argument_of_an_encoder_is_an_attribute():
    given = {
        "num_channels": 12,
        "num_codebooks": 4,
        "key_value_pairs_per_codebook": 16,
        "dim_keys": 5,
        "dim_values": 6,
        "init_mode": "kmeans",
        "kmeans_iters": 3,
        "splitting_mode": "learned_projection",
        "decay": 0.8,
        "eps": 1e-4,
        "threshold_ema_dead_code": 0.2,
        "encoder_is_channel_last": False,
        "concat_values_from_all_codebooks": True,
        "sample_codebook_temperature": 0.5,
        "return_values_only": False,
        "topk": 2,
    }
    for kind in (core.BottleneckedEncoder, kvb.BottleneckedEncoder):
        module = kind(nn.Identity(), **given)
        assert {name: getattr(module, name) for name in given} == given
    named = core.ConvMixerBottleneckedEncoder(16, 10, input_is_embedding=True)
    assert (named.num_codebooks, named.dim_keys, named.dim_values, named.num_channels) == (16, 16, 16, 256)


def test_constants_of_the_encoders():
    assert {
        *("chunk", "random_projection", "sparse_projection", "learned_projection")
    } == core.BottleneckedEncoder.VALID_SPLITTING_MODES
    by_layer = {1: 256, 2: 512, 3: 1024, 4: 2048}
    wide = {1: 512, 2: 1024, 3: 2048, 4: 4096}
    wanted = {
        "Dino": {
            "VALID_BACKBONES": ["dino_resnet50", "dino_vits8"],
            "RESNET_LAYER_TO_CHANNELS": by_layer,
            "DINO_VITS8_DIM_EMBEDDING": 384,
        },
        "Swav": {
            "VALID_BACKBONES": ["swav_resnet50", "swav_resnet50w2"],
            "RESNET_LAYER_TO_CHANNELS": by_layer,
            "RESNETw2_LAYER_TO_CHANNELS": wide,
        },
        "VICReg": {
            "VALID_BACKBONES": ["vicreg_resnet50", "vicreg_resnet50w2"],
            "RESNET_LAYER_TO_CHANNELS": by_layer,
            "RESNETw2_LAYER_TO_CHANNELS": wide,
        },
        "SLPretrained": {
            "VALID_BACKBONES": [
                *("cifar10_resnet56", "cifar10_resnet22", "cifar100_resnet56", "cifar100_resnet22"),
                "resnet50_imagenet_v2",
            ],
            "CIFAR_RESNET_LAYER_TO_CHANNELS": {1: 16, 2: 32, 3: 64},
            "IMAGENET_RESNET_LAYER_TO_CHANNELS": by_layer,
        },
        "CLIP": {"VALID_BACKBONES": ["clip_vit_b32"], "CLIP_VIT_B32_DIM_EMBEDDING": 512},
        "ConvMixer": {"VALID_BACKBONES": ["convmixer"], "CONVMIXER_DIM_EMBEDDING": 256},
    }
    for name, constants in wanted.items():
        kind = getattr(core, f"{name}BottleneckedEncoder")
        assert {constant: getattr(kind, constant) for constant in constants} == constants
        assert kind.VALID_SPLITTING_MODES == core.BottleneckedEncoder.VALID_SPLITTING_MODES


def test_hooks_build_each_part_once():
    calls = []

    class Own(core.BottleneckedEncoder):
        def _init_splitter(self):
            calls.append(("splitter", self.num_channels, self.dim_keys))
            return nn.Flatten(0, 0)

        def _init_bottleneck(self):
            calls.append(("bottleneck", self.dim_values, self.topk))
            bottleneck = super()._init_bottleneck()
            bottleneck.values.data.zero_()
            return bottleneck

    module = Own(nn.Identity(), 12, 4, 16, 3, 6)
    assert calls == [("splitter", 12, 3), ("bottleneck", 6, 1)]
    assert isinstance(module.splitter, nn.Flatten)
    assert not module.bottleneck.values.any()


def test_wrappers_of_the_encoders_networks():
    class Tower(nn.Linear):
        def encode_image(self, x):
            return self(x)

    x = torch.randn(2, 3, dtype=torch.float64)
    tower = Tower(3, 4, dtype=torch.float64)
    for kind in (core.CLIPModelWrapper, core.SwavModelWrapper):
        wrapped = kind(tower)
        assert wrapped.model is tower
        assert torch.equal(wrapped(x), tower(x).float())


@pytest.mark.parametrize("name", ["Dino", "Swav", "VICReg", "SLPretrained", "CLIP", "ConvMixer"])
def test_named_encoders(name):
    module = getattr(core, f"{name}BottleneckedEncoder")(
        num_codebooks=16, key_value_pairs_per_codebook=10, input_is_embedding=True, return_values_only=False
    )
    assert isinstance(module.bottleneck, core.KeyValueBottleneck)
    values, keys, *_, heads, features = module(torch.randn(2, module.num_channels))
    assert values.shape == (2, 1, module.num_channels)
    assert keys.shape == (2, 16, 1, module.num_channels // 16)
    assert heads.shape == (2, 16, 1, module.num_channels // 16)
    assert features.shape == (2, module.num_channels)
