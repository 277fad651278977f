"""The studies of edits, on a small part of the digits: what they promise holds, and a promise that breaks is seen."""

from __future__ import annotations

import importlib
import json
import urllib.request

import pytest
import torch

from kvb import __main__

editing = pytest.importorskip("kvb.experiments.editing", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
demo = importlib.import_module("kvb.experiments.demo")
edited = importlib.import_module("kvb.experiments.edited")
DIGITS = importlib.import_module("kvb.experiments.data.digits").STUDY


def silent(line):
    pass


def part(problem, each=300):
    """Of every example of a problem, a few."""
    train, test = (
        side.take(torch.arange(0, len(side.labels), step))
        for side, step in ((problem.train, len(problem.train.labels) // each), (problem.test, 3))
    )
    return problem.__class__(train, test, train, test, problem.tasks)


@pytest.fixture(scope="module")
def small():
    return part(demo.load(DIGITS, 0))


@pytest.fixture(scope="module", params=edited.MODELS, ids=lambda kind: kind.name)
def model(request, small):
    return request.param(DIGITS, small.train, small.test, 0)


@pytest.mark.parametrize("kind", ["swap", "correct"])
def test_an_edit_holds_keeps_its_promise_and_is_taken_back(model, kind):
    one = editing.edit(model, kind, 1, 3)
    assert one.held == 1
    assert 1 <= one.steps <= edited.MOST
    assert one.kept
    assert one.reverted
    assert one.promised <= one.same
    if model.name == "linear":
        assert one.promised == one.same == 0
        assert one.rows == 1
    else:
        assert one.promised > 0.5
        pairs, fetched = model.state[0].shape[1], {"counts": 8, "values": 1}[model.name]
        assert one.rows == pytest.approx(fetched / pairs)


@pytest.mark.parametrize("model", [edited.Values], ids=["values"], indirect=True)
def test_a_broken_promise_and_a_failed_reversal_are_seen(model, monkeypatch):
    step, state = model.step, model.copy()

    def careless(samples, old, new, *, first):
        step(samples, old, new, first=first)
        model.table += 1e-3  # all rows

    with monkeypatch.context() as patched:
        patched.setattr(model, "step", careless)
        patched.setattr(model, "revert", lambda *_: None)
        one = editing.edit(model, "swap", 1, 2)
    assert not one.kept
    assert not one.reverted
    model.table.copy_(state[0])


def test_forgetting_leaves_what_was_never_learned(small, monkeypatch):
    found = editing.forgetting(DIGITS, small, 0, silent, subsets=4)
    assert [record["same"] for record in found.records] == [True] * 4
    assert "| 4 of 4 | learned again: the very state before, yes |" in found.table
    assert (
        "| each of 10 classes | 10 of 10; accuracy on it 0.0% | scores bit for bit the same, 10 of 10;" in found.table
    )
    remove = edited.ClassCounts.remove
    monkeypatch.setattr(edited.ClassCounts, "remove", lambda self, codes, labels: remove(self, codes[1:], labels[1:]))
    found = editing.forgetting(DIGITS, small, 0, silent, subsets=4)
    assert not any(record["same"] for record in found.records)


def test_counts_end_a_stream_of_edits_where_they_began(small):
    found = editing.continual(DIGITS, small, 0, silent, count=60)
    counts, values, linear = found.records
    assert [record["model"] for record in found.records] == ["counts", "values", "linear"]
    assert counts["same"]
    assert not values["same"]
    assert not linear["same"]
    assert counts["steps"] == 120
    assert counts["curve"][-1][1] == counts["curve"][0][1]
    assert dict(counts["curve"])[60] <= counts["curve"][0][1]
    assert [record["curve"][-1][0] for record in found.records] == [120] * 3


def test_a_wrong_label_is_first_and_the_right_one_last(model):
    stream = list(editing._stream(model, 20, torch.Generator().manual_seed(0)))
    now = dict.fromkeys(range(len(model.train.labels)))
    for rows, old, new in stream:
        row = int(rows)
        assert int(old) == (int(model.train.labels[row]) if now[row] is None else now[row])
        assert int(new) != int(old)
        now[row] = int(new)
    changed = {row: label for row, label in now.items() if label is not None}
    assert len(changed) == 20
    assert all(label == int(model.train.labels[row]) for row, label in changed.items())


@pytest.mark.parametrize("name", ["edits", "forgetting", "continual"])
def test_the_command_writes_a_table_a_figure_and_numbers(offline, name, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", lambda *_: small)
    monkeypatch.setattr(editing, "SIZES", (1, 2))
    few = {"edits": {"repeats": 1}, "forgetting": {"subsets": 2}, "continual": {"count": 10}}[name]
    whole = editing.STUDIES[name]
    monkeypatch.setitem(editing.STUDIES, name, lambda *arguments: whole(*arguments, **few))
    assert __main__.main(["study", name, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"{name}-digits.json").read_text())
    assert record["records"]
    assert record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert (tmp_path / f"{name}-digits.md").read_text().splitlines()[-1] in printed
    assert (tmp_path / f"{name}-digits.png").read_bytes().startswith(b"\x89PNG")


def test_offline_means_that_nothing_can_be_fetched(offline):
    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://localhost:1", timeout=1)


def test_unknown_studies_are_refused(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["study", "nothing"])
    assert "edits" in capsys.readouterr().err


def test_no_more_is_corrected_than_is_wrong(small, monkeypatch):
    """Sizes are those of the samples that there were, each of them once."""
    monkeypatch.setattr(editing, "MODELS", (edited.Values,))
    monkeypatch.setattr(editing, "SIZES", (1, 1000, 2000))
    model = edited.Values(DIGITS, small.train, small.test, 0)
    wrong = round((1 - model.accuracy()) * len(model.test.labels))
    found = editing.edits(DIGITS, small, 0, silent, repeats=1).records
    assert [record["size"] for record in found if record["kind"] == "correct"] == [1, wrong]
