"""What the pictures show, read back from what was drawn; and a page of them."""

import base64
import re
import subprocess
import sys

import pytest
import torch

import kvb

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from matplotlib.figure import Figure

from kvb import plots, report
from kvb.data import CodeDataset


def counted(hits, values=None):
    """A bottleneck with these hits [C, K]."""
    hits = torch.tensor(hits)
    C, K = hits.shape
    module = kvb.KeyValueBottleneck(C, K, 3, 4).freeze_keys().eval()
    module.cluster_size_counter.copy_(hits)
    if values is not None:
        module.values.data.copy_(torch.tensor(values))
    return module


HITS = [[4, 0, 4, 0], [1, 1, 1, 5]]


def test_usage():
    axes = plots.usage(counted(HITS))
    assert axes.get_title() == "25.0% of all pairs without a hit"
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == 8
    assert heights[0] == 2


def test_lorenz():
    axes = plots.lorenz(counted(HITS))
    first, second, mean, equal = (line.get_ydata() for line in axes.lines)
    assert list(first) == [0, 0, 0, 0.5, 1]
    assert list(second) == [0, 0.125, 0.25, 0.375, 1]
    assert list(mean) == [0, 0.0625, 0.125, 0.4375, 1]
    assert list(equal) == [0, 1]
    # Twice the area between the diagonal and the mean curve.
    assert axes.get_title() == f"Gini coefficient {1 - 2 * (0.0625 + 0.125 + 0.4375 + 0.5) / 4:.2f}"


def test_key_map_shows_distances_in_the_plane():
    module = counted(HITS)
    keys = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 4, 0], [3, 4, 0]])
    module.unfreeze_keys().set_keys(keys.expand(2, 4, 3)).freeze_keys()
    module.cluster_size_counter.copy_(torch.tensor(HITS))
    axes = plots.key_map(module, 1)
    drawn = torch.tensor(axes.collections[0].get_offsets().tolist())
    torch.testing.assert_close(torch.cdist(drawn, drawn), torch.cdist(keys, keys))
    assert axes.collections[0].get_sizes().tolist() == [15, 15, 15, 75]
    assert len(plots.key_map(module, 0).collections[1].get_offsets()) == 2


@pytest.mark.parametrize("D", [1, 2])
def test_keys_of_few_dimensions(D):
    module = kvb.KeyValueBottleneck(1, 4, D, 4).freeze_keys()
    module.cluster_size_counter += 1
    assert plots.key_map(module).collections[0].get_offsets().shape == (4, 2)


def test_values_are_in_the_order_of_their_classes():
    table = [[0, 0, 3, 0], [5, 0, 0, 0], [0, 1, 0, 0], [9, 0, 0, 0]]
    axes = plots.values(counted([[1] * 4], [table]), names=["a", "b", "c", "d"])
    drawn = axes.images[0].get_array().tolist()
    assert [row.index(max(row)) for row in drawn] == [0, 0, 1, 2]
    assert drawn[0] == [9, 0, 0, 0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "d"]


def test_winning_classes_are_named_beside_their_pairs():
    table = [[0, 0, 3, 0], [5, 0, 0, 0], [0, 0, 0, 0], [9, 0, 0, 0]]
    axes = plots.values(counted([[1] * 4], [table]))
    won = [(label.get_text(), place) for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)]
    assert won == [("0", 0.5), ("2", 2), ("none", 3)]  # two pairs, one, and one that says nothing
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5, 2.5]


def test_matrices_and_given_axes():
    mine = Figure().subplots()
    matrix = torch.tensor([[1, torch.nan], [0.5, 0.25]])
    assert plots.accuracies(matrix, mine) is mine
    assert mine.images[0].get_array().filled(-1).tolist() == [[1, -1], [0.5, 0.25]]
    assert [number.get_text() for number in mine.texts] == ["1.00", "0.50", "0.25"]
    shared = plots.overlap(torch.tensor([[1, 0.4], [0.4, 1]]), names=["a", "b"])
    assert shared.get_yticklabels()[1].get_text() == "b"
    drawn = shared.images[0].get_array().filled(-1)
    assert drawn.flatten().tolist() == pytest.approx([-1, 0.4, 0.4, -1]), "a class shares everything with itself"
    assert shared.images[0].get_clim() == (0, pytest.approx(0.4))
    assert len(plots.overlap(torch.ones(1, 1)).images) == 1


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.usage(kvb.KeyValueBottleneck(2, 4, 3, 4).freeze_keys()), ValueError, "nothing was counted yet"),
        (lambda: plots.usage(torch.nn.Linear(2, 2)), TypeError, "expected a KeyValueBottleneck or a module around one"),
        (lambda: plots.key_map(counted(HITS), 2), ValueError, r"codebook must be in \[0, 2\), got 2"),
        (lambda: plots.values(counted(HITS), names=["a"]), ValueError, "expected 4 names, got 1"),
        (lambda: plots.overlap(torch.zeros(2, 3)), ValueError, r"expected shared of shape \(L, L\), got \(2, 3\)"),
    ],
)
def test_what_cannot_be_drawn(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


# --- the page ---------------------------------------------------------------------------------------------------------


def pictures(page):
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', page)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for _, picture in found)
    return [caption for caption, _ in found]


@pytest.fixture
def encoder():
    model = kvb.BottleneckedEncoder(torch.nn.Linear(6, 12), 12, 3, 8, 4, 5)
    model.train()
    model(torch.randn(20, 6))
    return model.freeze_keys()


def test_a_page_of_a_file(encoder, tmp_path):
    encoder(torch.randn(20, 6))
    kvb.save(encoder, tmp_path / "<m>.safetensors")
    page = report.write(tmp_path / "<m>.safetensors", tmp_path / "page.html").read_text()
    assert "<h1>&lt;m&gt;.safetensors</h1>" in page
    assert "3 codebooks of 8 pairs, keys of 4 and values of 5 numbers" in page
    assert f"<td>pairs in use</td><td>{1 - encoder.fraction_of_unused_keys():.1%}</td>" in page
    assert len(pictures(page)) == 4
    assert "http" not in page, "it needs nothing else"


def test_a_page_of_a_folder_with_codes(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "model")
    assert pictures(report.write(tmp_path / "model", tmp_path / "page.html").read_text()) == ["What values say"]
    data = torch.utils.data.TensorDataset(torch.randn(30, 6), torch.arange(30) % 3)
    encoder.encode_dataset(torch.utils.data.DataLoader(data, batch_size=10), out=tmp_path / "codes.npy", progress=False)
    done = subprocess.run(
        [sys.executable, "-m", "kvb", "report", "model", "--data", "codes.npy"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<td>samples</td><td>30, of codes.npy</td>" in page
    assert "What classes share" in pictures(page)
    codes = CodeDataset.open(tmp_path / "codes.npy").codes
    used = sum(len(codes[:, c].unique()) for c in range(3)) / 24
    assert f"<td>pairs in use</td><td>{used:.1%}</td>" in page


def test_accuracies_on_the_page(encoder, tmp_path):
    kvb.save(encoder, tmp_path / "m.pt")
    (tmp_path / "ok.json").write_text("[[0.5, null], [0.25, 1]]")
    page = report.write(tmp_path / "m.pt", tmp_path / "page.html", accuracies=tmp_path / "ok.json").read_text()
    assert pictures(page)[-1] == "What tasks cost each other"
    for text in ("[[0.5", "[[0.5], 3]", '[["a"]]', "7"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="expected a JSON list of rows of numbers in .*bad.json"):
            report.write(tmp_path / "m.pt", tmp_path / "page.html", accuracies=tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[[0.5, 1]]")
    with pytest.raises(ValueError, match=r"of shape \(L, L\), got \(1, 2\)"):
        report.write(tmp_path / "m.pt", tmp_path / "page.html", accuracies=tmp_path / "bad.json")


def test_files_without_a_bottleneck_or_with_two(encoder, tmp_path):
    kvb.save(torch.nn.Linear(2, 2), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="expected one bottleneck in .*none.pt, found 0"):
        report.write(tmp_path / "none.pt", tmp_path / "page.html")
    two = torch.nn.ModuleList([kvb.KeyValueBottleneck(2, 4, 3, 4) for _ in range(2)])
    kvb.save(two, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="expected one bottleneck in .*two.pt, found 2"):
        report.write(tmp_path / "two.pt", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
