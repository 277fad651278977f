"""The paper's protocol: what each scenario trains and leaves alone, the other heads, the numbers."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from kvb import KeyValueBottleneck
from kvb.classifier import KeyValueClassifier
from kvb.experiments import (
    BottleneckHead,
    Budget,
    CodesHead,
    Examples,
    Head,
    NearestMeanHead,
    NetworkHead,
    Plateau,
    Result,
    Score,
    draw_tasks,
    learn,
    protocol,
)

V, CHANNELS = 6, 12
RECIPE = protocol.Recipe(
    codebooks=5,
    pairs=16,
    dim_keys=4,
    key_init="sample",
    key_steps=3,
    epochs=3,
    batch_size=16,
    rates=(0.1, 1.0),
    hidden=8,
    projected=32,
)
TASKS = tuple(torch.tensor([5, 0, 3, 1, 4, 2]).split(2))


def blobs(each, seed):
    """``each`` examples of every class around centres of their own."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(V, CHANNELS, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(V).repeat_interleave(each)
    return Examples(centres[labels] + 0.3 * torch.randn(len(labels), CHANNELS, generator=generator), labels)


TRAIN, TEST = blobs(25, 1), blobs(10, 2)
DATA = protocol.normalised(protocol.Data(blobs(20, 3).features, TRAIN, TEST))
train = partial(learn, train=DATA.train, test=DATA.test, tasks=TASKS, rate=0.3, budget=RECIPE.budget, seed=0)


def flat(lists):
    return [one for each in lists for one in each]


@pytest.fixture
def keys():
    return protocol.learn_keys(RECIPE, DATA.keys, V, 0)


class Spy(Head):
    """Remembers the labels of every batch, and tells losses from a list."""

    def __init__(self, losses=()):
        super().__init__()
        self.seen, self.losses = [], list(losses)

    def step(self, prepared, labels, *, rate, budget):
        self.seen.append(labels.tolist())
        return torch.tensor(self.losses.pop(0) if self.losses else 0.0)

    def forward(self, prepared):
        return prepared.new_zeros(len(prepared), V)


# --- what is trained, and what is not ---------------------------------------------------------------------------------


def test_class_incremental_training_sees_one_task_at_a_time_and_all_of_it_in_every_epoch():
    spy, begun = Spy(), 0
    for task, score in zip(TASKS, train(spy), strict=True):
        batches, begun = spy.seen[begun:], len(spy.seen)
        assert score.steps == len(batches) == RECIPE.epochs * 4  # 50 examples in batches of 16
        for epoch in range(RECIPE.epochs):
            labels = flat(batches[4 * epoch : 4 * epoch + 4])
            assert sorted(labels) == sorted(task.tolist() * 25)


def test_iid_training_mixes_all_classes_in_as_many_steps():
    spy, tasks = Spy(), Spy()
    (score,) = train(spy, scenario="iid")
    steps = sum(score.steps for score in train(tasks))
    assert score.steps == len(spy.seen) == len(tasks.seen) == steps
    assert all(len(set(batch)) > 2 for batch in spy.seen if len(batch) == 16)
    assert sorted(flat(spy.seen[:10])) == DATA.train.labels.tolist()  # the first of its epochs


def test_a_task_has_a_head_of_its_own_and_its_classes_in_their_order():
    spies = [Spy() for _ in TASKS]
    list(train(spies, scenario="task-incremental"))
    assert all(set(flat(spy.seen)) == {0, 1} for spy in spies)


def test_tables_of_earlier_tasks_stay_bitwise_unchanged(keys):
    tables = [torch.zeros(RECIPE.codebooks, RECIPE.pairs, 2) for _ in TASKS]
    heads = [CodesHead(table) for table in tables]
    encoder = BottleneckHead(keys.splitter, keys.bottleneck)
    parts = {"train": DATA.train, "test": DATA.test}
    coded = {name: part._replace(features=encoder.prepare(part.features)) for name, part in parts.items()}
    before = keys.bottleneck.keys.clone(), keys.bottleneck.values.clone()
    kept = []
    for number, score in enumerate(train(heads, **coded, scenario="task-incremental")):
        assert all(torch.equal(table, copy) for table, copy in zip(tables, kept, strict=False))
        assert tables[number].any()
        assert not any(table.any() for table in tables[number + 1 :])
        kept = [table.clone() for table in tables[: number + 1]]
        assert score.by_task[number] > 0.9
    assert torch.equal(keys.bottleneck.keys, before[0])
    assert torch.equal(keys.bottleneck.values, before[1])


def test_rows_that_later_tasks_do_not_name_stay_bitwise_unchanged(keys):
    head = BottleneckHead(keys.splitter, keys.bottleneck)
    codes = head.prepare(DATA.train.features).long()
    later = torch.zeros(RECIPE.codebooks, RECIPE.pairs, dtype=torch.bool)
    later.scatter_(1, codes[torch.isin(DATA.train.labels, torch.cat(TASKS[1:]))].t(), True)
    scores = train(head)
    next(scores)
    first = head.values.detach().clone()
    list(scores)
    assert first[~later].any()
    assert torch.equal(head.values[~later], first[~later])
    assert not torch.equal(head.values[later], first[later])


def test_nothing_is_searched_during_training(keys, monkeypatch):
    head = BottleneckHead(keys.splitter, keys.bottleneck)
    prepare = head.prepare
    searched = []

    def spy(features):
        searched.append(len(features))
        return prepare(features)

    monkeypatch.setattr(head, "prepare", spy)
    original = KeyValueBottleneck._search
    calls = []
    monkeypatch.setattr(
        KeyValueBottleneck, "_search", lambda self, q, *rest: calls.append(len(q)) or original(self, q, *rest)
    )
    list(train(head))
    assert searched == [len(DATA.train.labels), len(DATA.test.labels)]
    assert sum(calls) == sum(searched)


def test_a_step_is_that_of_autograd(keys):
    head = BottleneckHead(keys.splitter, keys.bottleneck)
    nn.init.normal_(head.values)
    codes, labels, start = head.prepare(DATA.train.features[:32]), DATA.train.labels[:32], head.values.detach().clone()
    budget = Budget(1, 32, label_smoothing=0.1, clip_norm=0.01)  # clips
    loss = head.step(codes, labels, rate=0.3, budget=budget)
    moved = head.values.detach().clone()
    with torch.no_grad():
        head.values.copy_(start)
    same = NetworkHead(head)  # the same logits, trained as any network
    torch.testing.assert_close(same.step(codes, labels, rate=0.3, budget=budget), loss)
    torch.testing.assert_close(head.values.detach(), moved)
    assert not torch.equal(moved, start)


@pytest.mark.parametrize("scenario", ["class-incremental", "task-incremental", "iid", "domain"])
def test_heads_that_do_not_fit_the_scenario_are_refused(scenario):
    heads = Spy() if scenario == "task-incremental" else [Spy() for _ in TASKS]
    with pytest.raises(ValueError, match="takes|must be one of"):
        next(train(heads, scenario=scenario))


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_plateau_of_the_loss_ends_a_task():
    # Epochs of one batch: 1.0 0.5 0.46 0.45 0.44; the last three are not 0.1 lower than the best.
    spy = Spy([1.0, 0.5, 0.46, 0.45, 0.44, 0.1])
    budget = replace(RECIPE.budget, epochs=50, batch_size=1000)
    scores = train(spy, budget=budget, stop=Plateau(patience=3, min_delta=0.1))
    assert next(scores).steps == 5
    # Ever lower, it goes on to the end.
    spy.losses = [float(-step) for step in range(100)]
    assert next(scores).steps == 50


def test_epochs_are_the_default():
    assert protocol.Recipe().stop is None
    assert replace(RECIPE, patience=4).stop == Plateau(4, 0.0)


# --- the other heads --------------------------------------------------------------------------------------------------


def test_nearest_means_are_those_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    judge = neighbors.NearestCentroid().fit(DATA.train.features.double().numpy(), DATA.train.labels.numpy())
    noisy = Examples(DATA.test.features + 0.6 * torch.randn(60, CHANNELS), DATA.test.labels)
    answers = judge.predict(noisy.features.double().numpy())
    for scenario in ("class-incremental", "iid"):
        head = NearestMeanHead(CHANNELS, V)
        *_, last = train(head, test=noisy, scenario=scenario)
        assert torch.equal(head(noisy.features).argmax(-1), torch.from_numpy(answers))
        assert last.seen == pytest.approx((answers == noisy.labels.numpy()).mean())
        assert head.counts.tolist() == [25] * V
        torch.testing.assert_close(head.sums / 25, torch.from_numpy(judge.centroids_))


def test_nearest_means_never_answer_what_they_have_not_seen():
    head = NearestMeanHead(CHANNELS, V)
    assert next(train(head)).seen == 1
    assert set(head(DATA.test.features).argmax(-1).tolist()) == set(TASKS[0].tolist())


def test_all_heads_get_the_same_batches():
    spies = [Spy(), Spy()]
    for spy in spies:
        list(train(spy))
    assert spies[0].seen == spies[1].seen


# --- keys and data ----------------------------------------------------------------------------------------------------


def test_key_data_is_set_aside_from_every_class_and_trains_nothing():
    data = protocol.set_aside(TRAIN, TEST, 0.4, torch.Generator().manual_seed(0))
    assert len(data.keys) == 60
    assert data.train.labels.bincount().tolist() == [15] * V
    assert not (data.keys[:, None] == data.train.features).all(-1).any()
    assert data.test is TEST


def test_features_are_centred_and_scaled_by_the_key_data_alone():
    raw = protocol.Data(3 * blobs(20, 3).features + 7, TRAIN, TEST)
    other = raw._replace(train=blobs(3, 9), test=blobs(3, 8))
    done, again = protocol.normalised(raw), protocol.normalised(other)
    torch.testing.assert_close(done.keys.mean(0), torch.zeros(CHANNELS), atol=1e-5, rtol=0)
    assert done.keys.norm(dim=1).mean().item() == pytest.approx(1)
    assert torch.equal(done.keys, again.keys)


@pytest.mark.parametrize("init", ["random", "sample"])
def test_keys_learn_the_papers_way(init):
    recipe = replace(RECIPE, key_init=init, key_steps=1)
    learned = protocol.learn_keys(recipe, DATA.keys, V, 0)
    bottleneck = learned.bottleneck
    assert not bottleneck.update_keys
    assert bottleneck.decay == 0.95
    assert bottleneck.threshold_ema_dead_code == pytest.approx(0.1 * 16 / 16)
    assert learned.report.rows == len(DATA.keys)
    started = protocol.learn_keys(replace(recipe, key_steps=0), DATA.keys, V, 0).bottleneck
    assert not torch.equal(started.keys, bottleneck.keys)  # a whole pass of moving averages, or none


def test_the_defaults_are_the_papers():
    recipe = protocol.Recipe()
    assert (recipe.codebooks, recipe.pairs, recipe.dim_keys, recipe.key_init) == (256, 4096, 14, "random")
    assert (recipe.decay, recipe.dead, recipe.rate, recipe.clip_norm) == (0.95, 0.1, 0.3, 1.0)
    assert (recipe.label_smoothing, recipe.batch_size, recipe.epochs, recipe.hidden) == (0.1, 256, 2000, 128)
    assert 0.001 in recipe.rates


def test_codes_used_by_hand():
    assert protocol.codes_used(torch.tensor([[0, 1], [0, 2], [3, 2]], dtype=torch.int16), 4) == 0.5


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    return [protocol.run(RECIPE, DATA, seed) for seed in (0, 1)]


def test_a_run_has_every_scenario_and_head(runs):
    for each in runs:
        assert tuple(each.results) == ("class-incremental", "task-incremental", "iid")
        for scenario, heads in each.results.items():
            assert tuple(heads) == protocol.HEADS
            assert all(len(result.scores) == (1 if scenario == "iid" else 3) for result in heads.values())
            assert heads["bottleneck"].final > 0.9
            assert {each.rates[scenario][name] for name in ("linear", "MLP")} <= set(RECIPE.rates)
            assert each.rates[scenario]["bottleneck"] == 0.3
        assert each.results["task-incremental"]["bottleneck"].forgetting == 0
        assert 0 < each.codes_used <= 1
        assert sorted(flat(each.tasks)) == list(range(V))


def test_one_seed_gives_one_run_and_another_seed_another(runs):
    torch.manual_seed(5)  # the caller's generator neither matters nor moves
    before = torch.get_rng_state()
    assert protocol.run(RECIPE, DATA, 1) == runs[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].tasks != runs[1].tasks


def test_a_run_starts_at_zero_whatever_ran_before_it(runs):
    alone = protocol.run(RECIPE, DATA, 0, scenarios=("iid",), heads=("bottleneck",))
    assert alone.results["iid"]["bottleneck"] == runs[0].results["iid"]["bottleneck"]


def test_json_gives_everything_back(runs):
    record = json.loads(json.dumps(protocol.to_json(RECIPE, runs)))
    assert protocol.from_json(record) == (RECIPE, runs)
    cell = record["summary"]["class-incremental"]["bottleneck"]["final_accuracy"]
    assert cell["mean"] == pytest.approx(
        sum(each.results["class-incremental"]["bottleneck"].final for each in runs) / 2
    )


def test_summaries_by_hand():
    matrices = [[[1.0, 0.0], [0.5, 1.0]], [[0.9, 0.1], [0.6, 0.8]]]
    by_hand = [
        protocol.Run(
            seed,
            [[0], [1]],
            0.5,
            "",
            {},
            {"iid": {"x": Result([Score(seen, row) for seen, row in zip((1.0, end), matrix, strict=True)])}},
        )
        for seed, (matrix, end) in enumerate(zip(matrices, (0.75, 0.7), strict=True))
    ]
    found = protocol.summary(by_hand, "iid", "x")
    assert found["final_accuracy"] == (pytest.approx(0.725), pytest.approx(0.05 / 2**0.5))
    assert found["average_accuracy"].mean == pytest.approx((0.875 + 0.85) / 2)
    assert found["forgetting"] == (pytest.approx(0.4), pytest.approx(0.2 / 2**0.5))
    assert str(protocol.spread([0.5, 0.7])) == "0.600 ± 0.141"
    assert protocol.spread([0.5]) == (0.5, 0)


def test_ablations_vary_one_number():
    for axis, numbers in protocol.ABLATIONS.items():
        found = protocol.variants(RECIPE, axis)
        assert [getattr(each, axis) for each in found.values()] == list(numbers)
        assert all(replace(each, **{axis: getattr(RECIPE, axis)}) == RECIPE for each in found.values())
    with pytest.raises(ValueError, match="axis must be one of codebooks"):
        protocol.variants(RECIPE, "rate")


@pytest.mark.parametrize("wrong", [{"scenarios": ("domain",)}, {"heads": ("forest",)}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="got '(domain|forest)'"):
        protocol.run(RECIPE, DATA, 0, **wrong)


def test_tasks_are_those_of_the_demo_for_the_same_generator():
    tasks = draw_tasks(V, 2, torch.Generator().manual_seed(3))
    assert [task.tolist() for task in tasks] == protocol.run(RECIPE, DATA, 3, heads=("nearest mean",)).tasks


def test_few_labels_are_the_same_of_every_class():
    few = protocol.with_few_labels(DATA, 5, 0)
    assert few.train.labels.bincount().tolist() == [5] * V
    assert torch.equal(few.keys, DATA.keys)
    assert not torch.equal(protocol.with_few_labels(DATA, 5, 1).train.features, few.train.features)


def test_one_label_of_a_class_is_enough():
    """None can be spared for the choice of rates, which is made on the training examples."""
    few = protocol.with_few_labels(DATA, 1, 0)
    run = protocol.run(RECIPE, few, 0, scenarios=("class-incremental",), heads=("counting", "linear", "nearest mean"))
    results = run.results["class-incremental"]
    assert run.rates["class-incremental"]["linear"] in RECIPE.rates
    assert results["counting"].final > 0.8
    assert results["nearest mean"].final > 0.8


def test_a_cache_is_not_kept():
    """What a head has to keep to go on: counts, and keys with their projection, without tables made for a question."""
    run = protocol.run(RECIPE, DATA, 0, scenarios=("iid",), heads=("counting",))
    model = KeyValueClassifier().fit_keys(DATA.keys)
    coder, counts = model.coder_.state_dict(), model.new_counts(V).state_dict()
    assert run.kept["counting"] == sum(part.nbytes for part in (*coder.values(), *counts.values()))


def test_the_counting_head_is_the_classifier_with_its_defaults():
    run = protocol.run(RECIPE, DATA, 3, scenarios=("class-incremental",), heads=("counting",))
    model = KeyValueClassifier(random_state=3).fit_keys(DATA.keys)
    for task, score in zip(run.tasks, run.results["class-incremental"]["counting"].scores, strict=True):
        rows = torch.isin(DATA.train.labels, torch.tensor(task))
        model.partial_fit(DATA.train.features[rows], DATA.train.labels[rows])
        seen = torch.isin(DATA.test.labels, model.classes_)
        assert model.score(DATA.test.features[seen], DATA.test.labels[seen]) == score.seen


def test_the_counting_head_ends_tasks_where_it_ends_all_at_once():
    tasks, together = (
        protocol.run(RECIPE, DATA, 0, scenarios=(scenario,), heads=("counting",)).results[scenario]["counting"]
        for scenario in ("class-incremental", "iid")
    )
    assert tasks.final == together.final
    assert tasks.final > 0.9
