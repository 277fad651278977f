"""The study of facts, on a small graph that is made up: ranks, edits in one step, and what they leave alone."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from kvb import __main__
from kvb.experiments.data import graphs

facts = pytest.importorskip("kvb.experiments.facts", reason="needs kvb[demo]", exc_type=ModuleNotFoundError)
answers = importlib.import_module("kvb.experiments.answers")
PEOPLE = 16


def family():
    """Rings of friends and of teachers: some facts are left for test and validation."""
    lines = [
        f"p{one}\t{relation}\tp{(one + step) % PEOPLE}"
        for one in range(PEOPLE)
        for relation, steps in (("knows", (1, 2, 15)), ("teaches", (4,)), ("reads", (5, 6, 7)))
        for step in steps
    ]
    parts = {"train": lines[0::4] + lines[1::4] + lines[2::4], "valid": lines[3::8], "test": lines[7::8]}
    return graphs.parse("family", {name: "\n".join(part) + "\n" for name, part in parts.items()})


@pytest.fixture(scope="module")
def graph():
    return family()


@pytest.fixture(scope="module")
def models(graph):
    with facts.seeded(0):
        encoder = answers.Embedding(graph, epochs=20, rank=8)
        return encoder, answers.Neighbours(graph, encoder, 3), answers.Bottleneck(graph, encoder, codebooks=8, pairs=16)


def test_facts_are_read_and_asked_both_ways(graph):
    assert (graph.entities, graph.relations, graph.questions) == (PEOPLE, 3, 6 * PEOPLE)
    assert sum(len(part) for part in (graph.train, graph.valid, graph.test)) == 7 * PEOPLE
    fact = torch.tensor([[3, 1, 7]])
    questions, wanted = graph.asked(fact)
    assert questions.tolist() == [1 * PEOPLE + 3, (1 + 3) * PEOPLE + 7]
    assert wanted.tolist() == [7, 3]
    assert graph.true().sum() == 2 * 7 * PEOPLE


def test_ranks_are_filtered_and_ties_count_as_their_mean(graph, monkeypatch):
    class Given(answers.Answers):
        def scores(self, questions):
            return table[questions]

    table = torch.zeros(graph.questions, PEOPLE)
    fact, true = graph.test[:1], graph.true()
    questions, wanted = graph.asked(fact)
    for question, answer in zip(questions.tolist(), wanted.tolist(), strict=True):
        table[question, true[question]] = 9.0  # other answers do not count, however high
        table[question, answer] = 1.0
        rivals = (~true[question]).nonzero()[:, 0].tolist()
        table[question, rivals[0]], table[question, rivals[1:3]] = 2.0, 1.0
    assert facts.ranks(Given(), graph, fact, true).tolist() == [1 + 1 + 2 / 2] * 2
    assert facts.links(torch.tensor([1.0, 4.0, 20.0])) == pytest.approx(
        {"MRR": (1 + 0.25 + 0.05) / 3, "Hits@1": 1 / 3, "Hits@10": 2 / 3}
    )


def test_neighbours_answer_what_near_questions_have_learned(graph, models):
    neighbours = models[1]
    question = neighbours.learned[5:6]
    distances = (neighbours.features[neighbours.learned] - neighbours.features[question]).pow(2).sum(1)
    nearest = neighbours.learned[distances.argsort()[:3]]
    torch.testing.assert_close(neighbours.scores(question)[0], neighbours.known[nearest].mean(0))


def test_an_edit_is_right_after_one_step_and_leaves_alone_what_shares_no_row(graph, models):
    bottleneck = models[2]
    true, kept = graph.true(), bottleneck.bottleneck.values.clone()
    every = torch.arange(graph.questions)
    for old, new in facts.draw(graph, 12, 0):
        goals = facts.goals_of(graph, old, new, true)
        before = bottleneck.scores(every)
        sharing = bottleneck.sharing(goals, every)
        assert not sharing.all()
        bottleneck.step(goals, true)
        assert bottleneck.right(goals, true)
        assert torch.equal(bottleneck.scores(every)[~sharing], before[~sharing])
        rows = bottleneck.codes[[goal.question for goal in goals]]
        fetched = torch.zeros(kept.shape[:2], dtype=torch.bool)
        fetched[torch.arange(len(kept)), rows] = True
        assert torch.equal(bottleneck.bottleneck.values[~fetched], kept[~fetched])
        bottleneck.bottleneck.values.copy_(kept)


def test_goals_that_share_rows_are_reached_together(graph, models):
    """One score up and another down in the same column, from rows that are mostly the same."""
    bottleneck, true = models[2], graph.true()
    same = (bottleneck.codes[:, None] == bottleneck.codes[None]).sum(2)
    first, second = ((same > 4) & (same < 8)).nonzero()[0].tolist()
    entity = int((~true[first] & ~true[second]).nonzero()[0])
    goals = [answers.Goal(first, entity, True), answers.Goal(second, entity, False)]
    kept = bottleneck.bottleneck.values.clone()
    bottleneck.step(goals, true)
    assert bottleneck.right(goals, true)
    bottleneck.bottleneck.values.copy_(kept)


def test_draws_are_new_facts_and_each_kind_in_turn(graph):
    drawn, true = facts.draw(graph, 15, 0), graph.true()
    assert [(old is None, new is None) for old, new in drawn[:3]] == [(False, False), (True, False), (False, True)]
    added = [tuple(new.tolist()) for _, new in drawn if new is not None]
    removed = [tuple(old.tolist()) for old, _ in drawn if old is not None]
    assert len({*added}) == len(added)
    assert len({*removed}) == len(removed)
    for new in added:
        assert not true[graph.asked(torch.tensor([new]))].any()


def test_a_change_where_no_row_is_shared_is_seen(graph, models, monkeypatch):
    bottleneck = models[2]
    kept, step = bottleneck.bottleneck.values.clone(), answers.Bottleneck.step

    def careless(self, goals, true):
        step(self, goals, true)
        self.bottleneck.values += 1e-3  # all rows

    sound = facts.edit(bottleneck, graph, 6, 0)
    assert (sound.at_once, sound.steps, sound.apart_changed) == (1, 1, 0)
    assert 0 < sound.apart < 1
    assert sound.apart + sound.changed <= 1
    bottleneck.bottleneck.values.copy_(kept)
    monkeypatch.setattr(answers.Bottleneck, "step", careless)
    assert facts.edit(bottleneck, graph, 6, 0).apart_changed > 0
    bottleneck.bottleneck.values.copy_(kept)


def test_an_embedding_is_tuned_on_a_copy(graph, models):
    encoder = models[0]
    before = encoder.entities.detach().clone()
    one = facts.edit(encoder.tuned(0.1), graph, 6, 0)
    assert one.model == "embedding, rate 0.1"
    assert (one.apart, one.apart_changed) == (0, 0)
    assert one.changed > 0.3
    assert torch.equal(encoder.entities, before)


def test_the_command_writes_tables_a_figure_and_numbers(offline, tmp_path, monkeypatch):
    small = graphs.Graphs(names=("family",), load=lambda name: family())
    monkeypatch.setattr(graphs, "STUDY", small)
    monkeypatch.setattr(facts, "SEEDS", 2)
    monkeypatch.setattr(facts, "EDITS", 6)
    monkeypatch.setattr(answers, "EPOCHS", 3)
    assert __main__.main(["study", "facts", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "facts.json").read_text())
    links = [one for one in record["records"] if "MRR" in one]
    assert [one["seed"] for one in links] == [0] * 3 + [1] * 3
    assert {one["model"] for one in links} == {"embedding", "nearest neighbours", "bottleneck"}
    assert len(record["records"]) - len(links) == 3
    assert (tmp_path / "facts.md").read_text().count("| family |") == 6
    assert (tmp_path / "facts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("study", "data"), [("facts", "digits"), ("edits", "graphs"), ("generate", "20ng")])
def test_a_study_refuses_data_that_it_is_not_about(study, data, tmp_path):
    with pytest.raises(SystemExit, match=f"--data of study {study} must be one of .*; got '{data}'"):
        __main__.main(["study", study, "--data", data, "--out", str(tmp_path)])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def absent(name):
        raise graphs.packages.MissingPackageError("pykeen 1.11.1 is needed, but is not installed.")

    monkeypatch.setattr(graphs, "STUDY", graphs.Graphs(load=absent))
    with pytest.raises(SystemExit, match="make data-graphs"):
        __main__.main(["study", "facts", "--out", str(tmp_path)])


def test_the_published_graphs_have_their_sizes():
    try:
        found = [graphs.load(name) for name in graphs.NAMES]
    except graphs.packages.MissingPackageError:
        pytest.skip("needs the package of `make data-graphs`")
    sizes = [(one.entities, one.relations, *map(len, (one.train, one.valid, one.test))) for one in found]
    assert sizes == [(14, 55, 1592, 199, 201), (135, 46, 5216, 652, 661), (104, 25, 8544, 1068, 1074)]
