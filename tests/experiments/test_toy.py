"""The toy of the paper's figure 2: bottlenecks keep what they learned, the other heads do not; its files."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from kvb import __main__

toy = pytest.importorskip("kvb.experiments.toy", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
SHORT = replace(toy.STUDY, steps=60, rate=0.01, key_steps=30)
ONE, MANY = "1 codebook of 400", "20 codebooks of 20"


@pytest.fixture(scope="module")
def done():
    return toy.run(SHORT, 1)


def test_the_bottlenecks_remember_and_the_others_forget(done):
    for name in (ONE, MANY):
        assert done.results[name].final > 0.9
        assert done.results[name].forgetting < 0.02
    for name in ("linear", "MLP"):
        assert done.results[name].final < 0.4
        assert done.results[name].forgetting > 0.6


def test_values_at_rest_do_not_move_but_by_adam(done):
    for name in (ONE, MANY):
        assert done.rest[name].rows > 5
        assert done.rest[name].learned > 0.1
        assert done.rest[name].moved == 0
    assert done.rest[toy.OTHER].rows == done.rest[ONE].rows
    assert done.rest[toy.OTHER].moved > 1e-3
    assert any("Adam's averages" in line for line in done.audit)


def test_one_seed_gives_one_result_and_leaves_the_rest_alone(done):
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    short = replace(SHORT, steps=3)
    assert toy.run(short, 5).results == toy.run(short, 5).results
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_the_points(done):
    train, test = toy.draw(SHORT, torch.Generator().manual_seed(3))
    assert train.features.shape == (800, 2)
    assert train.labels.bincount().tolist() == [100] * 8
    assert not torch.equal(train.features, test.features)
    centres = torch.stack([train.features[train.labels == label].mean(0) for label in range(8)])
    assert torch.pdist(centres).min() > toy.CENTRE_GAP - 0.03


def test_maps_cover_the_square_from_the_bottom(done):
    places = toy.square().view(toy.GRID, toy.GRID, 2)
    assert places[0, -1, 0] > 0.99
    assert places[0, -1, 1] < 0.01
    shape = (toy.GRID, toy.GRID, 8)
    assert all(drawn.shape == shape for maps in done.maps.values() for drawn in maps)
    # Where the first class's points are, the map of the bottleneck says so, to the end.
    x, y = done.train.features[done.train.labels == 0].mean(0).mul(toy.GRID).long().tolist()
    assert [drawn[y, x].argmax().item() for drawn in done.maps[MANY]] == [0] * 4


def test_the_files_of_the_command(tmp_path, capsys, monkeypatch):
    module = importlib.import_module("kvb.experiments.toy")
    monkeypatch.setattr(module, "STUDY", replace(SHORT, steps=5))
    __main__.main(["demo", "--data", "toy", "--out", str(tmp_path / "new"), "--seed", "2"])
    record = json.loads((tmp_path / "new" / "toy.json").read_text())
    assert record["seed"] == 2
    assert set(record["heads"]) == {*toy.HEADS, toy.OTHER}
    assert record["values_of_the_first_task_alone"][ONE]["moved"] == 0
    assert (tmp_path / "new" / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "new" / "toy.png") in capsys.readouterr().out
