"""The demo: what it promises, its protocol on tiny cases, its command line."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from starts import from_zero
from torch import nn

from kvb import KeyValueBottleneck, __main__
from kvb.decoders import CodebookVoting
from kvb.experiments import class_incremental as protocol
from kvb.experiments.heads import BottleneckHead
from kvb.splitters import RandomProjection

demo = pytest.importorskip("kvb.experiments.demo", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
DIGITS = importlib.import_module("kvb.experiments.data.digits").STUDY


@pytest.fixture(scope="module")
def demos():
    return {seed: demo.run(DIGITS, seed) for seed in (0, 1, 2)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bottleneck_remembers_and_the_others_forget(demos, seed):
    results = demos[seed].results
    bottleneck, linear, mlp = results["bottleneck"], results["linear"], results["MLP"]
    assert bottleneck.final >= 0.95
    assert bottleneck.final > linear.final
    assert bottleneck.final - mlp.final > 0.3
    assert bottleneck.forgetting < linear.forgetting < mlp.forgetting


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_baselines_that_start_at_zero_stay_below_the_bottleneck(demos, seed, monkeypatch):
    """The most favourable start for the other heads that we know of; the header of the report says the same."""

    for name in ("linear", "MLP"):
        monkeypatch.setitem(demo.HEADS, name, from_zero(demo.HEADS[name]))
    results = demo.run(DIGITS, seed).results
    assert results["bottleneck"] == demos[seed].results["bottleneck"]
    assert results["bottleneck"].final > max(results["linear"].final, results["MLP"].final) + 0.05
    assert results["MLP"].final > demos[seed].results["MLP"].final


def test_one_seed_gives_one_result(demos):
    torch.manual_seed(123)  # the caller's generator neither matters nor moves
    before = torch.get_rng_state()
    assert demo.run(DIGITS, 1) == demos[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_baselines_best_rates_lie_inside_the_grid(demos):
    for result in demos.values():
        for name in ("linear", "MLP"):
            assert min(DIGITS.rates) < result.rates[name] < max(DIGITS.rates)


def test_splits_share_no_image_and_keep_the_classes_balanced():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(20)
    rest, part = protocol.stratified_split(labels, 0.2, generator)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(200))
    assert labels[part].bincount().tolist() == [4] * 10


def test_tasks_hold_every_class_once():
    tasks = protocol.draw_tasks(10, 2, torch.Generator().manual_seed(0))
    assert [len(task) for task in tasks] == [2] * 5
    assert torch.cat(tasks).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("size", [0, 3])
def test_uneven_tasks_are_refused(size):
    with pytest.raises(ValueError, match=f"must divide the 10 classes evenly, got {size}"):
        protocol.draw_tasks(10, size, torch.Generator())


def test_measures_by_hand():
    rows = [[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [0.25, 0.9, 1.0]]
    result = protocol.Result([protocol.Score(seen, row) for seen, row in zip([1.0, 0.65, 0.72], rows, strict=True)])
    assert result.final == 0.72
    assert result.average == pytest.approx((1 + 0.65 + 0.72) / 3)
    assert result.forgetting == pytest.approx((0.75 - 0.1) / 2)
    assert protocol.Result(result.scores[:1]).forgetting == 0


def test_cached_codes_give_what_the_modules_give():
    features = torch.randn(50, 12)
    splitter = RandomProjection(12, 6, 4)
    bottleneck = KeyValueBottleneck(6, 16, 4, 3, init_mode="sample")
    bottleneck.init_keys(splitter(features), epochs=0, progress=False)
    head = BottleneckHead(splitter, bottleneck)
    assert not bottleneck.values.any()
    nn.init.normal_(bottleneck.values)
    plain = nn.Sequential(splitter, bottleneck, CodebookVoting(3))
    labels = torch.randint(3, (50,))
    grads = []
    for logits in (head(head.prepare(features)), plain(features)):
        bottleneck.values.grad = None
        nn.functional.cross_entropy(logits, labels).backward()
        grads.append((logits.detach(), bottleneck.values.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_only_the_values_learn():
    problem = demo.load(DIGITS, 0)
    head = demo.bottleneck_head(DIGITS, problem.train.features)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    list(protocol.learn(head, problem.train, problem.test, problem.tasks[:1], rate=0.3, budget=demo.BUDGET, seed=0))
    changed = [name for name, tensor in head.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["bottleneck.values"]


def test_the_files_of_the_command(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    __main__.main(["demo", "--out", str(out), "--seed", "3"])
    record = json.loads((out / "digits.json").read_text())
    assert record["seed"] == 3
    assert set(record["heads"]) == {"bottleneck", "linear", "MLP"}
    for head in record["heads"].values():
        assert len(head["accuracy_matrix"]) == len(head["accuracy_matrix"][0]) == 5
        assert head["final_accuracy"] == head["accuracy_over_seen_classes"][-1]
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "of ALL classes, without their labels" in printed
    assert str(out / "digits.png") in printed


def test_info_is_aligned(capsys):
    __main__.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)
    assert any(line.startswith("backend on cpu ") for line in lines)


@pytest.mark.parametrize("package", ["numpy", "sklearn", "matplotlib"])
def test_a_missing_extra_is_named_without_a_traceback(package, tmp_path):
    # None in sys.modules makes an import fail as if the package were not installed.
    code = f"import torch, sys; sys.modules[{package!r}] = None; from kvb.__main__ import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'kvb[demo]'" in done.stderr
    assert package in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unusable_folder_is_refused_before_the_run(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(SystemExit, match="--out must be a folder"):
        __main__.main(["demo", "--out", str(taken)])


@pytest.mark.parametrize("seed", ["-1", "x", str(1 << 63)])
def test_a_bad_seed_is_refused(seed, capsys):
    with pytest.raises(SystemExit):
        __main__.main(["demo", f"--seed={seed}"])
    assert "--seed" in capsys.readouterr().err
