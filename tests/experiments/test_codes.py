"""The study of codes, on a small part of the digits: what codes hold, what is measured, and who is beside them."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from kvb import __main__

codes = pytest.importorskip("kvb.experiments.codes", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
demo = importlib.import_module("kvb.experiments.demo")
DIGITS = importlib.import_module("kvb.experiments.data.digits").STUDY


@pytest.fixture(scope="module")
def problem():
    whole = demo.load(DIGITS, 0)
    some = slice(None, None, 4)
    return whole.__class__(
        *(part._replace(features=part.features[some], labels=part.labels[some]) for part in (whole.train, whole.test)),
        whole.fit,
        whole.validation,
        whole.tasks,
    )


@pytest.fixture
def cheap(monkeypatch):
    """Few keys, few iterations, and no faiss, which a run of CI lacks."""
    monkeypatch.setattr(codes, "PAIRS", 32)
    monkeypatch.setattr(codes, "LLOYD", 3)
    monkeypatch.setattr(codes, "faiss", lambda: None)


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_the_rotation_is_orthogonal_and_deals_variance_out_evenly(parts):
    x = torch.randn(300, 16) * torch.logspace(1, -1, 16)
    rotation = codes.balanced_rotation(x, parts)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(16), atol=1e-5, rtol=0)
    products = (x @ rotation).var(0).log().unflatten(0, (parts, -1)).sum(1)
    loads = x.var(0).log().unflatten(0, (parts, -1)).sum(1)
    assert parts in (1, 16) or products.max() - products.min() < 0.3 * (loads.max() - loads.min())


@pytest.mark.parametrize("options", [{"rotated": False}, {}, {"stages": 2}, {"learned": True}], ids=str)
def test_decoded_items_are_sums_of_what_their_bytes_stand_for(options, cheap, problem):
    x = problem.train.features
    with codes.seeded(0):
        quantizer = codes.Quantizer(x, 8, **options)
    found = quantizer.encode(problem.test.features)
    assert found.dtype == torch.uint8
    assert found.shape == (len(problem.test.labels), 8)
    wanted = torch.zeros(len(found), x.shape[1])
    tables = torch.cat([stage.bottleneck.values for stage in quantizer.stages])
    for codebook, column in enumerate(found.T.long()):
        wanted += tables[codebook, column]
    torch.testing.assert_close(quantizer.decode(found), wanted, atol=1e-5, rtol=1e-5)
    error = (quantizer.decode(found) - problem.test.features).pow(2).sum() / problem.test.features.pow(2).sum()
    assert error < 0.5


def test_values_that_learn_explain_more_of_what_they_learn_from(cheap, problem):
    x = problem.train.features
    with codes.seeded(0):
        stage = codes.Stage(x, 4, rotated=True)
    before = (stage.decode(stage.encode(x)) - x).pow(2).sum()
    stage.learn(x)
    assert (stage.decode(stage.encode(x)) - x).pow(2).sum() < before


def test_a_second_stage_codes_what_the_first_has_left(cheap, problem):
    x = problem.train.features
    with codes.seeded(0):
        both = codes.Quantizer(x, 8, stages=2)
    first = both.stages[0]
    left = x - first.decode(first.encode(x))
    assert torch.equal(both.encode(x)[:, 4:], both.stages[1].encode(left))
    assert (both.decode(both.encode(x)) - x).pow(2).sum() < left.pow(2).sum()


def test_recall_is_that_of_a_search_written_out():
    x, decoded = torch.randn(30, 5), torch.randn(30, 5)
    hits = 0
    for row in range(30):
        near = [
            {
                other
                for _, other in sorted((float((x[row] - items[o]).pow(2).sum()), o) for o in range(30) if o != row)[:3]
            }
            for items in (x, decoded)
        ]
        hits += len(near[0] & near[1])
    assert codes.recall(x, decoded, 3) == pytest.approx(hits / 90)
    assert codes.recall(x, x, 3) == 1


def test_the_probe_separates_what_a_line_separates():
    x, labels = torch.randn(200, 6), torch.arange(200) % 3
    x[torch.arange(200), labels] += 8
    assert codes.probe(x[:100], labels[:100], x[100:], labels[100:]) > 0.97
    assert codes.probe(x[:100], labels[torch.randperm(100)], x[100:], labels[100:]) < 0.7


def test_the_command_writes_a_table_a_figure_and_numbers(offline, cheap, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *_: problem)
    monkeypatch.setattr(codes, "SMALL_SIZES", (2, 4))
    assert __main__.main(["study", "codes", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "codes-digits.json").read_text())
    assert record["faiss"] is None
    by_way = {(one["way"], one["bytes"]): one for one in record["records"]}
    assert {way for way, _ in by_way} == {"float32", "float16", *codes.WAYS}
    assert by_way["float16", 128]["recall"] > 0.99
    for way in codes.WAYS:
        assert by_way[way, 4]["error"] < by_way[way, 2]["error"]
    assert "| faiss PQ |  | faiss is not installed |" in (tmp_path / "codes-digits.md").read_text()
    assert (tmp_path / "codes-digits.png").read_bytes().startswith(b"\x89PNG")


def test_codes_of_one_stage_are_as_good_as_those_of_faiss(problem):
    if codes.faiss() is None:
        pytest.skip("faiss is not installed")
    x, other = problem.train.features, problem.test.features
    with codes.seeded(0):
        ours, theirs = (
            way(x, other, 8)[1] for way in (codes.WAYS["kvb, parts as they come"], codes.OF_FAISS["faiss PQ"])
        )
    assert codes.recall(other, ours) > codes.recall(other, theirs) - 0.02
