"""The suites, their peers and reports: wrong results are not timed, documents keep their schema, README its tables."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import kvb
from kvb import __main__ as command_line

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not part of the package

from benchmarks import bars, bench, machine, overhead, peers, plots, report, results, scaling, suites, table  # noqa: E402
from benchmarks.peers import finders, need, plain  # noqa: E402
from benchmarks.shapes import GPU, SHAPES, Module  # noqa: E402
from benchmarks.suites import measuring  # noqa: E402
from benchmarks.timing import Absent, Contestant, Effort, Ratio, WrongResult, run_on  # noqa: E402

ONCE = Effort(rounds=1, seconds=0.0)
BY_HAND = "torch baddbmm"


def measure(suite="search", shape="seed_a", only=lambda peer: peer == BY_HAND):
    return measuring.measure(suite, SHAPES[shape].small(), ONCE, only, limits=False)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_is_right_against_plain_pytorch(suite):
    found = measure(suite, "seed_b", lambda peer: peer.startswith("torch") and peer != "torch.compile")
    assert found.peers
    assert not found.absent


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_right_against_plain_pytorch(shape):
    found = measure("forward", shape)
    assert found.peers == [BY_HAND]


def test_a_search_that_is_off_is_not_timed(monkeypatch):
    monkeypatch.setattr(plain.Chunked, "__call__", lambda self, queries: (queries[..., 0] * 0).long())
    found = measure()
    assert found.peers == []
    assert found.absent[BY_HAND].startswith("wrong, not timed: ")
    assert "not the nearest" in found.absent[BY_HAND]


def test_values_that_are_off_are_not_timed(monkeypatch):
    fetch = finders.fetch
    monkeypatch.setattr(finders, "fetch", lambda values, indices: fetch(values, indices) * 1.001)
    for suite in ("forward", "memories", "training_step", "end_to_end"):
        assert measure(suite).absent[BY_HAND].startswith("wrong, not timed: "), suite


def test_keys_that_move_elsewhere_are_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "bincount", lambda found, minlength: 2 * bincount(found, minlength=minlength))
    bincount = torch._C._VariableFunctions.bincount
    with pytest.raises(WrongResult, match="keys that were hit moved elsewhere"):
        measure("key_update")


def test_a_wrong_kvb_stops_its_row_and_fails_the_command(monkeypatch, capsys):
    def wrong(shape):
        case = search(shape)
        return case._replace(kvb=Contestant(lambda: case.kvb.run() + 1, case.kvb.verify))

    search = suites.SUITES["search"]
    monkeypatch.setitem(suites.SUITES, "search", wrong)
    with pytest.raises(WrongResult):
        measure()
    monkeypatch.setattr(bench, "QUICK", bench.Plan(("search",), ("seed_a",), ONCE, slow_peers=False))
    monkeypatch.setattr(bench, "shapes", lambda suite: {"seed_a": SHAPES["seed_a"].small()})
    assert bench.main(False, False, None, None) == 1
    assert "WRONG: search:seed_a: " in capsys.readouterr().out


def test_a_peer_that_breaks_is_listed(monkeypatch):
    def broken(queries, keys, **options):
        raise AttributeError("no such name")

    monkeypatch.setattr(plain, "_best_chunk", broken)
    assert measure("forward").absent == {BY_HAND: "failed: AttributeError: no such name"}


def test_what_does_not_fit_is_absent_with_its_size(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1000)
    found = measure(only=lambda peer: peer == "torch.cdist")
    assert "would take" in found.absent["torch.cdist"]
    assert "GB" in found.absent["torch.cdist"]
    with pytest.raises(Absent, match="verifying a step"):
        measure("training_step")


def test_who_is_slow_is_called_once():
    calls = []
    contestants = {
        name: Contestant(lambda name=name: calls.append(name), lambda found: None) for name in ("fast", "slow")
    }
    race = run_on(contestants, {"fast": 0.0, "slow": 9.0}, Effort(rounds=2, seconds=0.0, patience=1.0))
    assert "slow" not in calls
    assert race.seconds("slow") == 9.0
    assert race.ratio("slow", "fast").value > 1


# --- peers ------------------------------------------------------------------------------------------------------------


def test_absent_peers_are_listed_with_the_way_to_get_them(monkeypatch, capsys):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(need.importlib, "import_module", absent)
    bench.list_peers()
    text = capsys.readouterr().out
    assert all(name in text for name in peers.known())
    assert "absent: faiss cannot be imported (No module named 'faiss'): pip install faiss-cpu" in text
    assert (
        "key_value_bottleneck.core cannot be imported (No module named 'key_value_bottleneck.core'): it is not" in text
    )


def test_a_peer_is_one_file(monkeypatch, tmp_path):
    """The recipe: a file in benchmarks/peers is all that it takes to be listed, verified and timed."""
    (tmp_path / "dummy.py").write_text(
        "from benchmarks.peers import finders\n"
        "from benchmarks.peers.peer import Peer\n\n\n"
        "def prepare(queries, keys):\n"
        "    return lambda q: (q[..., None, :] - keys).square().sum(-1).argmin(-1)\n\n\n"
        'PEERS = (Peer("dummy", "by broadcasting", finders.offers(prepare, *finders.SUITES)),)\n'
    )
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path)])
    peers.known.cache_clear()
    try:
        assert peers.listed()["dummy"][1] == ""
        for suite in finders.SUITES:
            found = measure(suite, only=lambda peer: peer == "dummy")
            assert (found.peers, found.absent) == (["dummy"], {}), suite
    finally:
        sys.modules.pop("benchmarks.peers.dummy", None)
        peers.known.cache_clear()


def test_suites_of_peers_and_shapes_are_known():
    known = {*suites.SUITES}
    for peer in peers.known().values():
        assert set(peer.suites) <= known, peer.name
        assert set(peer.shapes) <= {*SHAPES, *GPU}, peer.name


def test_the_authors_package_where_it_is_there(monkeypatch):
    """Its place is taken by the replica, which has its names, its tuple and its axes."""
    replica = importlib.import_module("kvb.compat.key_value_bottleneck.core")
    monkeypatch.setitem(sys.modules, "key_value_bottleneck", importlib.import_module("kvb.compat.key_value_bottleneck"))
    monkeypatch.setitem(sys.modules, "key_value_bottleneck.core", replica)
    found = measure("forward", "nlp_dkvb", lambda peer: peer == "authors")
    assert found.peers == ["authors"]


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document():
    row = results.row("seed_a", SHAPES["seed_a"].small(), measure())
    return results.document("search", [row], load=0.1)


def test_a_document_says_who_was_how_fast(document):
    results.validate(json.loads(json.dumps(document)))
    (row,) = document["rows"]
    assert results.peers(row) == [BY_HAND]
    assert results.ratio(row, BY_HAND) == pytest.approx(results.mean_ratio([row]))
    assert results.share(row | {"ceiling": {"kind": "flops", "rate": 1e9}}) > 0
    assert results.share(row) is None


def change(document, path, value):
    changed = copy.deepcopy(document)
    *parents, last = path
    place = changed
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 2, "expected 1, got 2"),
        (["threads"], None, "missing ['threads']"),
        (["more"], 1, "unknown ['more']"),
        (["load"], "low", "document.load"),
        (["rows"], [], "rows: empty"),
        (["facts", "kvb"], 1, "facts.kvb: expected a text"),
        (["rows", 0, "sizes", "D"], -1, "sizes.D: expected a number"),
        (["rows", 0, "contestants", "kvb"], None, "no 'kvb'"),
        (["rows", 0, "contestants", "kvb", "p5"], 9.0, "out of order"),
        (["rows", 0, "contestants", "kvb", "median"], math.nan, "out of order"),
        (["rows", 0, "contestants", "kvb", "calls"], True, "calls: got bool"),
        (["rows", 0, "ceiling"], {"kind": "watts", "rate": 1.0}, "got 'watts'"),
    ],
)
def test_the_schema_refuses(document, path, value, message):
    with pytest.raises(results.BadResult) as refused:
        results.validate(change(document, path, value))
    assert message in str(refused.value)


def test_committed_results_keep_the_schema_and_their_names(document, tmp_path):
    results.committed()
    for folder in results.FOLDER.glob("*/"):
        results.committed(folder.name)
    file = results.write(document, tmp_path)
    assert file.name == f"search--{machine.slug()}--cpu.json"
    assert file.parent.name == kvb.__version__
    assert results.committed(folder=tmp_path) == {file.stem: document}
    file.rename(file.with_name("search--elsewhere--cpu.json"))
    with pytest.raises(results.BadResult, match="belongs at"):
        results.committed(folder=tmp_path)


# --- README and plots -------------------------------------------------------------------------------------------------


def test_readme_and_plots_show_the_committed_results():
    assert report.stale(ROOT, results.committed()) == [], "run python -m benchmarks.report"


def test_every_suite_has_its_place_on_the_page():
    shown = {name for _, name, *_ in report.BLOCK.findall((ROOT / "docs" / "benchmarks.md").read_text())}
    assert shown == {*suites.SUITES, "scaling", "gpu"}


def test_a_stale_readme_is_found_and_rewritten(document, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    readme, file = tmp_path / "README.md", tmp_path / "run.json"
    readme.write_text("before\n<!-- bench: search -->\nold\n<!-- end -->\nafter\n")
    file.write_text(json.dumps([document]))
    assert report.main([str(file)], tmp_path) == 0
    assert "| seed_a | " in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("<!-- end -->\nafter\n")
    assert report.main(["--check"], tmp_path) == 0

    picture = tmp_path / "docs" / plots.file_name(document)
    picture.write_text(picture.read_text().replace(plots.digest(document), "0"))
    readme.write_text(readme.read_text().replace("seed_a", "seed_c"))
    (tmp_path / "docs" / "bench-gone--x--cpu.svg").touch()
    capsys.readouterr()
    assert report.main(["--check"], tmp_path) == 1
    said = capsys.readouterr().out
    assert all(
        f"{name} is stale" in said for name in ("README.md", f"docs/{picture.name}", "docs/bench-gone--x--cpu.svg")
    )
    assert report.main([], tmp_path) == 0
    assert report.main(["--check"], tmp_path) == 0


def test_the_table_of_what_people_use_now(document):
    (row,) = document["rows"]
    forward = document | {"suite": "forward", "rows": [row | {"shape": "paper_cifar10"}]}
    text = report.section("against", {"search": document, "forward": forward})
    (line,) = (line for line in text.splitlines() if "baddbmm" in line)
    assert f"({bench.times(results.ratio(row, BY_HAND))})" in line
    assert bench.seconds(row["contestants"][BY_HAND]["median"]) in line
    assert report.section("against", {"search": document}) == "Not measured yet.\n"
    for way in report.INSTEAD:
        assert way.peer in peers.known()
        assert way.shape in suites.shapes(way.suite)


# --- scaling, overhead, bars ------------------------------------------------------------------------------------------


def test_exponents_and_the_crossover():
    assert scaling.slope([(x, 3 * x**1.5) for x in (1.0, 10.0, 100.0)]) == pytest.approx(1.5)
    assert scaling.slope([(1.0, 0.0), (2.0, 1.0)]) is None
    assert scaling.crossover({1: 0.5, 2: 1.5, 4: 0.9, 8: 1.1, 16: 3.0}) == 8
    assert scaling.crossover({1: 0.5}) is None


def test_axes_span_three_decades():
    assert all(sizes[-1] >= 1000 * sizes[0] for sizes in scaling.AXES.values())


def test_the_scaling_study_makes_a_document_and_a_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "BASE", Module(16, 2, 20, 4, 3, ()))
    monkeypatch.setattr(measuring, "_ceiling", lambda kind, threads: (Contestant(lambda: 0, lambda found: None), 1e3))
    found = scaling.study(ONCE, dict.fromkeys(scaling.AXES, (4, 8)), cubes=(1, 2))
    assert set(found["crossover"]["ratios"]) == {"1", "2"}
    assert found["overhead"]["gradient"]["ratio"] > 0
    assert set(found["fits"]) == set(scaling.AXES)
    assert "A call on one pair costs: forward: " in report.section("scaling", {"one": found})
    pytest.importorskip("matplotlib")
    (file,) = plots.draw([found], tmp_path)
    assert plots.shows(file.read_text(), found)


def test_a_call_that_is_wrong_is_not_timed(monkeypatch):
    forward = kvb.KeyValueBottleneck.forward
    monkeypatch.setattr(kvb.KeyValueBottleneck, "forward", lambda self, x: forward(self, x) + 1)
    with pytest.raises(WrongResult, match="one number"):
        overhead.measure(False, ONCE)


@pytest.mark.parametrize(("ratio", "status"), [(1.9, 1), (2.0, 0)])
def test_bars_fail_where_a_ratio_falls_short(ratio, status, monkeypatch, capsys):
    threads = torch.get_num_threads()
    found = table.Measured(1.0, ratio, "s", "somebody", Ratio(ratio, ratio, ratio))
    monkeypatch.setattr(bars, "ROWS", (table.Row("one:row", lambda quick: found, 2.0),))
    assert bars.main([]) == status
    assert ("below their bars: one:row" in capsys.readouterr().out) == bool(status)
    torch.set_num_threads(threads)


def test_every_bar_can_be_measured():
    names = [row.name for row in bars.ROWS]
    assert len(set(names)) == len(names)
    assert {"search-mean", "call:gradient", "forward:paper", "step:fused", "race:losses"} <= set(names)


def test_the_race_among_the_bars_raises_what_is_wrong(monkeypatch):
    lines = [
        {"ratio": ratio, "low": 1, "high": 3, "best": "faiss", "seconds": {"faiss": 2.0, "kvb": 1.0}}
        for ratio in (0.5, 2)
    ]
    monkeypatch.setattr(bars.racing, "race", lambda draw, effort: (lines * bars.RACED)[draw.index])
    bars._raced.cache_clear()
    try:
        assert bars.race_mean(True).ratio.value == pytest.approx(1, rel=0.3)
        assert bars.race_losses(True).ratio.value == pytest.approx(0.5, abs=0.1)
        lines[1] = {**bars.draws.draw(0, 1)[0]._asdict(), "wrong": "off by one"}
        bars._raced.cache_clear()
        with pytest.raises(WrongResult, match="off by one"):
            bars.race_mean(True)
    finally:
        bars._raced.cache_clear()


# --- the command line -------------------------------------------------------------------------------------------------


def test_bench_writes_its_numbers_and_pictures(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "QUICK", bench.Plan(("search",), ("seed_a",), ONCE, slow_peers=False))
    monkeypatch.setattr(bench, "shapes", lambda suite: {"seed_a": SHAPES["seed_a"].small()})
    target = tmp_path / "all.json"
    assert command_line.main(["bench", "--quick", "--json", str(target), "--plot", str(tmp_path / "plots")]) == 0
    (found,) = json.loads(target.read_text())
    results.validate(found)
    assert (tmp_path / "plots" / plots.file_name(found)).is_file()
    said = capsys.readouterr().out
    assert "search:seed_a" in said
    assert "geometric mean" in said


def test_bench_needs_a_checkout(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="benchmarks")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(SystemExit, match="come with the source, not with the package: run this in a checkout of kvb"):
        command_line.main(["bench"])


def test_bench_says_where_it_cannot_write(tmp_path):
    with pytest.raises(SystemExit, match="There is no folder .*nowhere to write to"):
        command_line.main(["bench", "--json", str(tmp_path / "nowhere" / "all.json")])
