"""Modules and the Hugging Face Hub's own library, as far as one comes without its server."""

import inspect

import pytest
import torch

import kvb

pytestmark = pytest.mark.integrations
huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install 'kvb[integrations]'")


def taught():
    module = kvb.KeyValueBottleneck(3, 8, 4, 5).train()
    module(torch.randn(20, 3, 4))
    module.freeze_keys()(torch.randn(20, 3, 4))
    return module.eval()


def test_from_the_librarys_cache(tmp_path):
    """Laid out as the library lays it out; nothing asks the network."""
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--me--memory"
    module = taught()
    module.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    again = kvb.KeyValueBottleneck.from_pretrained("me/memory", cache_dir=tmp_path, local_files_only=True)
    x = torch.randn(9, 3, 4)
    assert torch.equal(again(x), module(x))
    with pytest.raises(OSError, match="offline|local_files_only|cached snapshot"):
        kvb.KeyValueBottleneck.from_pretrained("me/other", cache_dir=tmp_path, local_files_only=True)


def test_what_an_upload_calls(monkeypatch):
    """Every call fits the library's signatures, and uploads what can be loaded again."""
    called, folders = [], []

    def recording(name):
        method = inspect.signature(getattr(huggingface_hub.HfApi, name))

        def record(self, *args, **kwargs):
            given = method.bind(self, *args, **kwargs).arguments
            called.append(name)
            if name == "upload_folder":
                folders.append(kvb.load(given["folder_path"]))
            return huggingface_hub.RepoUrl("https://huggingface.co/me/memory") if name == "create_repo" else False

        return record

    for name in ("create_repo", "file_exists", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, recording(name))
    module = taught()
    assert module.push_to_hub("me/memory", private=True) == "https://huggingface.co/me/memory"
    assert called == ["create_repo", "file_exists", "upload_folder"]
    assert torch.equal(folders[0].keys, module.keys)


def test_the_card_is_one_that_the_library_reads(tmp_path):
    taught().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "kvb"
    assert "discrete-key-value-bottleneck" in card.data.tags
    assert "| pairs in use |" in card.text
