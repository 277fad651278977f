"""Modules in folders and on the Hugging Face Hub: built again from what they hold, and from nothing else."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import kvb
from kvb.modules import hub

pytest.importorskip("safetensors", reason="safetensors is not installed")


def features(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))


def taught(module, *sizes):
    """With keys, counts and a mask that a new module does not have."""
    module.train()
    module(features(30, *sizes))
    module.freeze_keys()
    module(features(30, *sizes))
    return module.mask_pairs((torch.arange(8) % 5 < 4).expand(3, 8)).eval()


MODULES = {
    "bottleneck": (lambda: kvb.KeyValueBottleneck(3, 8, 4, 5, topk=2, decay=0.7, init_values="zeros"), {}, (3, 4)),
    "waiting": (lambda: kvb.KeyValueBottleneck(3, 8, 4, 5, init_mode="kmeans"), {}, (3, 4)),
    "encoder": (
        lambda: kvb.BottleneckedEncoder(nn.Linear(6, 12), 12, 3, 8, 4, 5, concat_values_from_all_codebooks=True),
        {"encoder": lambda: nn.Linear(6, 12)},
        (6,),
    ),
    "splitter": (
        lambda: kvb.BottleneckedEncoder(
            nn.Linear(6, 12), 12, 3, 8, 4, 5, splitting_mode=kvb.splitters.LearnedProjection(12, 3, 4)
        ),
        {"encoder": lambda: nn.Linear(6, 12), "splitting_mode": lambda: kvb.splitters.LearnedProjection(12, 3, 4)},
        (6,),
    ),
    "discrete": (
        lambda: kvb.DiscreteKeyValueBottleneck(dim=4, dim_embed=6, num_memories=8, num_memory_codebooks=3),
        {},
        (6,),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name, tmp_path):
    make, arguments, sizes = MODULES[name]
    module = make() if name == "waiting" else taught(make(), *sizes)
    module.save_pretrained(tmp_path)
    parts = {part: new() for part, new in arguments.items()}
    before = torch.random.get_rng_state()
    for again in (type(module).from_pretrained(tmp_path, **parts), kvb.load(tmp_path, **parts)):
        assert type(again) is type(module)
        assert not again.training
        assert again.state_dict().keys() == module.state_dict().keys()
        for entry, tensor in module.state_dict().items():
            assert torch.equal(again.state_dict()[entry], tensor), entry
        if name != "waiting":
            assert torch.equal(again(features(9, *sizes)), module(features(9, *sizes)))
    assert torch.equal(torch.random.get_rng_state(), before), "building draws nothing"


def test_what_grew_comes_back_as_it_is(tmp_path):
    module = taught(MODULES["discrete"][0](), 6).expand_values(7).expand_pairs(11)
    module.save_pretrained(tmp_path)
    again = kvb.DiscreteKeyValueBottleneck.from_pretrained(tmp_path)
    assert torch.equal(again(features(9, 6)), module(features(9, 6)))
    encoder = MODULES["encoder"][0]().expand_values(7)
    encoder.save_pretrained(tmp_path)
    assert kvb.load(tmp_path, encoder=nn.Linear(6, 12)).bottleneck.values.shape == (3, 8, 7)


def test_arguments_win_over_those_saved(tmp_path):
    module = taught(MODULES["bottleneck"][0](), 3, 4)
    module.save_pretrained(tmp_path)
    again = kvb.KeyValueBottleneck.from_pretrained(tmp_path, topk=1, return_values_only=False)
    assert again(features(9, 3, 4)).indices.shape == (9, 3)


def test_a_hook_of_the_users_encoder_sees_tensors_with_data(tmp_path):
    """Code that nobody here knows may look at its tensors while they are loaded."""
    MODULES["encoder"][0]().save_pretrained(tmp_path)
    encoder, seen = nn.Linear(6, 12), []
    encoder.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module.weight.is_meta))
    again = kvb.BottleneckedEncoder.from_pretrained(tmp_path, encoder=encoder)
    assert seen == [False]
    assert not [entry for entry, tensor in again.state_dict().items() if tensor.is_meta]


def test_the_model_card(tmp_path):
    taught(MODULES["bottleneck"][0](), 3, 4).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kvb\n")
    assert "| sizes | 3 codebooks of 8 pairs, keys of 4 and values of 5 numbers |" in card
    assert "| keys | frozen |" in card
    assert "| perplexity of a codebook | " in card
    assert 'kvb.KeyValueBottleneck.from_pretrained("this folder or repository")' in card
    (tmp_path / "README.md").write_text("of the user")
    MODULES["encoder"][0]().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "of the user"


# --- what is wrong ----------------------------------------------------------------------------------------------------


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: field for name, field in config.items() if field != "gone"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kvb_config": 2}, "has version 2, but this kvb reads version 1: upgrade kvb"),
        ({"kvb_config": "gone"}, "was not written by kvb"),
        ({"more": 1}, r"has fields that kvb does not know: \['more'\]"),
        ({"options": "gone"}, "is damaged: expected a class, options and arguments"),
        ({"options": {"surprise": 1}}, "does not fit KeyValueBottleneck: .*surprise"),
        ({"class": "BottleneckedEncoder"}, "holds a BottleneckedEncoder, not a KeyValueBottleneck: use that class"),
    ],
)
def test_a_config_that_is_wrong(fields, message, tmp_path):
    MODULES["bottleneck"][0]().save_pretrained(tmp_path)
    changed(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        kvb.KeyValueBottleneck.from_pretrained(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    MODULES["bottleneck"][0]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="is damaged"):
        kvb.load(tmp_path)


def test_sizes_that_nobody_has_memory_for(tmp_path):
    """A config may claim anything: nothing of that size is made."""
    MODULES["bottleneck"][0]().save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())["options"]
    changed(tmp_path, options=options | {"key_value_pairs_per_codebook": 1 << 40})
    with pytest.raises(kvb.CheckpointError, match="expected shape"):
        kvb.load(tmp_path)


def test_what_load_is_told(tmp_path):
    module = MODULES["bottleneck"][0]()
    module.save_pretrained(tmp_path)
    changed(tmp_path, **{"class": "Mine"})
    with pytest.raises(ValueError, match="holds a Mine, which is no class of kvb"):
        kvb.load(tmp_path)
    with pytest.raises(TypeError, match="no folder of save_pretrained; build the module that the file is for"):
        kvb.load(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="takes a module and a file, or a folder"):
        kvb.load(module)
    with pytest.raises(TypeError, match="argument 'module' must be torch.nn.Module"):
        kvb.load("module", tmp_path / "model.safetensors")


def test_an_encoder_is_missing(tmp_path):
    MODULES["encoder"][0]().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"cannot hold encoder= \(it was of type Linear\): pass it again"):
        kvb.BottleneckedEncoder.from_pretrained(tmp_path)


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A Hub that is a folder."""
    home = tmp_path / "hub"

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            (home / name).mkdir(parents=True, exist_ok=True)
            return types.SimpleNamespace(repo_id=name)

        def file_exists(self, name, file, revision):
            return (home / name / file).exists()

        def upload_folder(self, repo_id, folder_path, revision, commit_message, ignore_patterns):
            for file in Path(folder_path).iterdir():
                if file.name not in ignore_patterns:
                    (home / repo_id / file.name).write_bytes(file.read_bytes())

    def snapshot_download(name, allow_patterns, **options):
        assert options == {"revision": "v1", "token": None, "cache_dir": None, "local_files_only": True}
        return str(home / name)

    fake = types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return home


def test_to_the_hub_and_back(library):
    module = taught(MODULES["bottleneck"][0](), 3, 4)
    (library / "me" / "memory").mkdir(parents=True)
    (library / "me" / "memory" / "README.md").write_text("of the user")
    module.push_to_hub("me/memory", token="secret")
    assert (library / "me" / "memory" / "README.md").read_text() == "of the user"
    again = kvb.KeyValueBottleneck.from_pretrained("me/memory", revision="v1", local_files_only=True)
    assert torch.equal(again(features(9, 3, 4)), module(features(9, 3, 4)))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="huggingface_hub is not installed: pip install huggingface_hub"):
        kvb.KeyValueBottleneck.from_pretrained("me/memory")
    with pytest.raises(RuntimeError, match="huggingface_hub is not installed"):
        MODULES["bottleneck"][0]().push_to_hub("me/memory")


class Mine(kvb.KeyValueBottleneck):
    def __init__(self, size):
        super().__init__(3, 8, 4, size)


def test_a_subclass_keeps_its_arguments(tmp_path):
    with pytest.raises(AttributeError, match="size"):
        Mine(5).save_pretrained(tmp_path)
    module = Mine(5)
    module.size = 5
    module.save_pretrained(tmp_path)
    assert hub.read_config(tmp_path)["options"] == {"size": 5}
    assert torch.equal(Mine.from_pretrained(tmp_path).values, module.values)


class Counted(kvb.BottleneckedEncoder):
    built = 0

    def __init__(self, encoder):
        Counted.built += 1
        super().__init__(encoder, 12, 3, 8, 4, 5)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_is_built_once(hooked, tmp_path):
    """Its constructor may be dear, or do more than build."""
    module = taught(Counted(nn.Linear(6, 12)), 6)
    module.save_pretrained(tmp_path)
    encoder = nn.Linear(6, 12)
    if hooked:
        encoder.register_load_state_dict_post_hook(lambda *_: None)
    Counted.built = 0
    again = Counted.from_pretrained(tmp_path, encoder=encoder)
    assert Counted.built == 1
    assert again.encoder is encoder
    assert torch.equal(again(features(9, 6)), module(features(9, 6)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 12)
        self.register_buffer("scale", torch.arange(12.0), persistent=False)

    def forward(self, x):
        return self.linear(x) * self.scale


class WithItsEncoder(kvb.BottleneckedEncoder):
    _arguments = dict

    def __init__(self):
        super().__init__(Scaled(), 12, 3, 8, 4, 5)


def test_what_a_constructor_makes_and_no_file_holds(tmp_path):
    module = taught(WithItsEncoder(), 6)
    module.save_pretrained(tmp_path)
    again = WithItsEncoder.from_pretrained(tmp_path)
    assert torch.equal(again(features(9, 6)), module(features(9, 6)))
