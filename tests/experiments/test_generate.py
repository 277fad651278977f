"""The study of a generative model, on a small part of the digits: what is drawn, what it costs, what stays."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch

from kvb import __main__

generate = pytest.importorskip("kvb.experiments.generate", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
digits = importlib.import_module("kvb.experiments.data.digits")
SPLIT = digits.STUDY.split


def part():
    train, test = SPLIT(torch.Generator().manual_seed(0), None)
    return train.take(torch.arange(0, len(train.labels), 8)), test.take(torch.arange(0, len(test.labels), 6))


@pytest.fixture(scope="module")
def levels_and_labels():
    return generate._levels(part()[0])


@pytest.fixture(scope="module")
def memory(levels_and_labels):
    """A memory of the classes 0 to 7."""
    levels, labels = levels_and_labels
    old = labels < generate.OLD
    with generate.seeded(0):
        network = generate.Network(generate.contexts(levels[:1]).shape[2], 10)
        network.learn(levels[old], labels[old], 1)
        network.requires_grad_(False).known = generate.OLD
        made = generate.Memory(network)
        made.learn(levels[old], labels[old], 1)
    return made


def test_a_context_holds_what_comes_before_and_nothing_else():
    levels = torch.randint(generate.LEVELS, (2, 64))
    seen = generate.contexts(levels)
    pixels = generate.REACH * (2 * generate.REACH + 2)
    assert seen.shape == (2, 64, pixels + 64)
    assert torch.equal(seen[0, :, pixels:], torch.eye(64))
    place = 3 * 8 + 4
    torch.testing.assert_close(seen[1, place, pixels - 1] * 16, levels[1, place - 1].float())  # the one to the left
    torch.testing.assert_close(seen[1, place, 17] * 16, levels[1, place - 8].float())  # the one above
    other = levels.clone()
    other[:, place:] = torch.randint(generate.LEVELS, (2, 64 - place))
    assert torch.equal(generate.contexts(other)[:, : place + 1], seen[:, : place + 1])
    assert not torch.equal(generate.contexts(other)[:, place + 1 :], seen[:, place + 1 :])


def test_bits_are_those_of_the_likelihood():
    def even(seen, labels):
        return torch.zeros(*seen.shape[:2], generate.LEVELS)

    levels, labels = torch.randint(generate.LEVELS, (5, 64)), torch.zeros(5, dtype=torch.int64)
    assert generate.bits(even, levels, labels) == pytest.approx(math.log2(17))

    def sure(seen, labels):
        return 50.0 * torch.nn.functional.one_hot(levels, generate.LEVELS)

    assert generate.bits(sure, levels, labels) == pytest.approx(0, abs=1e-6)
    assert torch.equal(
        generate.draw(lambda seen, labels: sure(seen, labels)[:, seen[0].argmax(1) * 0], labels, 1), levels[:, :1]
    )


def test_each_class_fetches_pairs_of_its_own(memory, levels_and_labels):
    levels, labels = levels_and_labels
    old = labels < generate.OLD
    queries = memory._queries(generate.contexts(levels[old]), labels[old])
    codes = memory.bottleneck.encode(queries)
    places = torch.tensor(memory.classes)[codes // generate.PAIRS]
    assert torch.equal(places, labels[old].repeat_interleave(64)[:, None].expand_as(places))


def test_new_classes_leave_the_old_ones_bit_for_bit(memory, levels_and_labels):
    levels, labels = levels_and_labels
    old = labels < generate.OLD
    seen = generate.contexts(levels)
    with torch.no_grad():
        before, first = memory(seen[old], labels[old]), generate.bits(memory.network, levels[~old], labels[~old])
    values = memory.bottleneck.values.detach().clone()
    memory.learn(levels[~old], labels[~old], 3)
    assert memory.classes == list(range(10))
    assert memory.bottleneck.values.shape[1] == 10 * generate.PAIRS
    with torch.no_grad():
        assert torch.equal(memory(seen[old], labels[old]), before)
    assert torch.equal(memory.bottleneck.values[:, : values.shape[1]], values)
    assert generate.bits(memory, levels[~old], labels[~old]) < first


def test_the_command_writes_a_table_a_figure_and_numbers(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "STUDY", replace(digits.STUDY, split=lambda *_: part()))
    for name, number in {"SEEDS": 1, "EPOCHS": 1, "PASSES": 1, "SAMPLES": 2, "PAIRS": 8}.items():
        monkeypatch.setattr(generate, name, number)
    assert __main__.main(["study", "generate", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "generate-digits.json").read_text())
    by_model = {one["model"]: one for one in record["records"]}
    assert len(by_model) == 4
    kept, frozen, tuned = (by_model[name] for name in ("with the memory", "without, frozen", "without, learns on"))
    assert kept["old_after"] == kept["old_before"]
    assert kept["old_before"] < frozen["old_before"]
    assert tuned["old_after"] != tuned["old_before"] == frozen["old_before"]
    assert (tmp_path / "generate-digits.md").read_text().count("±") == 4 * 5
    assert (tmp_path / "generate-digits.png").read_bytes().startswith(b"\x89PNG")
