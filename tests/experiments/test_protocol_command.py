"""``python -m kvb protocol``: what it writes, its options, and what it says where something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvb import __main__
from kvb.experiments import Examples, protocol


@pytest.fixture
def command(tmp_path):
    pytest.importorskip("kvb.experiments.report", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)

    def run(*options):
        assert __main__.main(["protocol", "--quick", "--out", str(tmp_path / "new"), *options]) == 0
        return tmp_path / "new"

    return run


def test_the_command_compares(command, capsys):
    out = command("--seeds", "2")
    record = json.loads((out / "protocol-digits.json").read_text())
    _, runs = protocol.from_json(record)
    assert [each.seed for each in runs] == [0, 1]
    table = (out / "protocol-digits.md").read_text()
    printed = capsys.readouterr().out
    assert table.strip() in printed
    for scenario in ("class-incremental", "task-incremental", "iid"):
        for head in protocol.HEADS:
            assert str(protocol.summary(runs, scenario, head)["final_accuracy"]) in table
    assert "without labels" in printed
    assert "codebooks 16, not 256" in printed
    assert (out / "protocol-digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_a_few_labels(command):
    out = command("--seeds", "1", "--scenario", "iid", "--labels", "8")
    record = json.loads((out / "protocol-digits-8-labels.json").read_text())
    _, (run,) = protocol.from_json(record)
    assert set(run.kept) == set(run.seconds["iid"]) == set(protocol.HEADS)
    assert "MB kept" in (out / "protocol-digits-8-labels.md").read_text()


def test_the_command_draws_a_curve_over_labels(command):
    out = command("--seeds", "1", "--labels", "1", "8", "all")
    record = json.loads((out / "labels-digits.json").read_text())["labels"]
    assert list(record) == ["1", "8", "all"]
    table = (out / "labels-digits.md").read_text()
    for name in record:
        _, (run,) = protocol.from_json(record[name])
        assert list(run.results) == ["class-incremental"]
        assert str(protocol.summary([run], "class-incremental", "counting")["final_accuracy"]) in table
    assert (out / "labels-digits.png").exists()


def test_the_command_takes_some_heads(command, capsys):
    out = command("--seeds", "1", "--scenario", "iid", "--heads", "counting", "nearest mean")
    _, (run,) = protocol.from_json(json.loads((out / "protocol-digits.json").read_text()))
    assert list(run.results["iid"]) == ["counting", "nearest mean"]
    assert "Pairs used" not in (out / "protocol-digits.md").read_text()
    with pytest.raises(SystemExit, match="--heads must be of bottleneck, counting"):
        command("--heads", "forest")


def test_the_command_learns_domains(command, capsys):
    out = command("--seeds", "1", "--scenario", "domain-incremental")
    record = json.loads((out / "protocol-digits-domains.json").read_text())
    _, (run,) = protocol.from_json(record)
    assert sorted(map(len, run.tasks)) == [10] * 5
    assert run.results["domain-incremental"]["counting"].final > 0.85
    assert "5 domains (each image is turned" in capsys.readouterr().out


def test_a_figure_shows_every_head():
    plots = pytest.importorskip("kvb.experiments.plots", exc_type=ModuleNotFoundError)
    assert len(set(plots.STYLES)) >= len(protocol.HEADS)


def test_the_command_takes_one_scenario_and_stops_on_a_plateau(command, capsys):
    out = command("--seeds", "1", "--scenario", "iid", "--epochs", "30", "--patience", "1")
    record = json.loads((out / "protocol-digits.json").read_text())
    assert list(record["summary"]) == ["iid"]
    assert record["recipe"]["epochs"] == 30
    assert record["recipe"]["patience"] == 1


@pytest.mark.parametrize("axis", ["codebooks", "pairs", "dim_keys", "key_data"])
def test_the_command_varies(axis, command):
    out = command("--seeds", "1", "--ablate", axis)
    record = json.loads((out / f"ablation-digits-{axis}.json").read_text())
    assert record["axis"] == axis
    assert len(record["values"]) == 2
    assert all(set(each["summary"]["iid"]) == {"bottleneck"} for each in record["values"].values())
    assert (out / f"ablation-digits-{axis}.md").read_text().startswith(f"| {axis} | class-incremental | iid |")
    assert (out / f"ablation-digits-{axis}.png").exists()


def test_the_full_run_tiles_and_counts_its_steps(command, capsys):
    out = command("--full", "--epochs", "1")
    record = json.loads((out / "full-digits.json").read_text())
    assert record["samples"] == 50_000
    assert record["steps"] == pytest.approx(200, abs=10)  # one epoch of 5 tasks of about 40 steps
    assert record["seen"][-1] > 0.8
    printed = capsys.readouterr().out
    assert printed.count("After task") == 5
    assert "ms per step" in printed


def test_tiling_repeats_examples_in_their_order():
    full = pytest.importorskip("kvb.experiments.full", exc_type=ModuleNotFoundError)
    examples = Examples(torch.randn(150, 12), torch.arange(150) % 6)
    tiled = full.tiled(examples, 400)
    assert torch.equal(tiled.features[:300], examples.features.repeat(2, 1))
    assert torch.equal(tiled.labels[300:], examples.labels[:100])


def test_key_data_of_the_digits():
    digits = pytest.importorskip("kvb.experiments.data.digits", exc_type=ModuleNotFoundError).SOURCE
    assert digits.key_choices == ("set aside", "training", "noise")
    aside, training, noise = (digits.data(0, None, name) for name in digits.key_choices)
    assert torch.equal(training.keys, training.train.features)
    assert torch.equal(noise.train.features, aside.train.features)
    assert noise.keys.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_a_missing_extra_is_named_without_a_traceback(tmp_path):
    code = "import torch, sys; sys.modules['sklearn'] = None; from kvb.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "protocol", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert "sklearn" in done.stderr
    assert "pip install 'kvb[demo]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_package_of_data_is_named(tmp_path, monkeypatch):
    packages = pytest.importorskip("kvb.experiments.data.packages", exc_type=ModuleNotFoundError)

    def absent(package, ending):
        raise packages.MissingPackageError(f"{package} is needed")

    pytest.importorskip("kvb.experiments.report", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
    monkeypatch.setattr(packages, "find", absent)
    with pytest.raises(SystemExit, match="make data-mnist"):
        __main__.main(["protocol", "--data", "mnist", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "bad", [["--seeds", "0"], ["--epochs", "x"], ["--ablate", "rate"], ["--full", "--ablate", "pairs"]]
)
def test_bad_options_are_refused(bad, capsys):
    with pytest.raises(SystemExit):
        __main__.main(["protocol", *bad])
    assert bad[-2] in capsys.readouterr().err


def test_an_unusable_folder_is_refused_before_the_run(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    pytest.importorskip("kvb.experiments.report", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
    with pytest.raises(SystemExit, match="--out must be a folder"):
        __main__.main(["protocol", "--out", str(taken)])


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kvb"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--seeds", "3"], ["--seeds", "1", "--ablate", "pairs"]])
def test_processes_of_torchrun_share_the_seeds(command, tmp_path, options):
    """The results of one process, written once."""
    options = [*options, "--scenario", "iid"]
    one, name = command(*options), "ablation-digits-pairs" if "--ablate" in options else "protocol-digits"
    together = [*TORCHRUN, "protocol", "--quick", "--out", str(tmp_path / "shared"), *options]
    done = subprocess.run(together, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written: ") == 1
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        f"{name}.{end}" for end in ("json", "md", "png")
    ]
    want, found = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, tmp_path / "shared"))
    assert without_times(found) == without_times(want)


def without_times(record):
    if isinstance(record, dict):
        return {name: without_times(part) for name, part in record.items() if name not in ("seconds", "versions")}
    return [without_times(part) for part in record] if isinstance(record, list) else record


def test_more_processes_than_seeds(monkeypatch):
    """A single process takes all; otherwise one that has nothing to do waits for the others."""
    from kvb.experiments import shares

    assert shares.results(range(3), lambda seed: seed * seed) == [0, 1, 4]
    given = {}
    for rank in (2, 1, 0):
        monkeypatch.setattr(shares, "_launched", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(shares.dist, "init_process_group", lambda *_, **__: None)
        monkeypatch.setattr(shares.dist, "destroy_process_group", lambda: None)

        def gather(own, found, rank=rank):
            given[rank] = own
            if found is not None:
                found[:] = [given[number] for number in range(3)]

        monkeypatch.setattr(shares.dist, "gather_object", gather)
        assert shares.results((5, 6), lambda seed: seed + 1) == (None if rank else [6, 7])
    assert given == {2: [], 1: [7], 0: [6]}


def test_kept_features_are_never_seen_half_written(tmp_path, monkeypatch):
    from kvb.experiments.data import packages

    def computed():
        return {"features": torch.ones(3)}

    save = torch.save

    def interrupted(state, file):
        save(state, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packages.cached(tmp_path, "some", computed)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(packages.cached(tmp_path, "some", computed)["features"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["some.pt"]
