"""Unlearning: histograms by hand, masks, forgetting and remembering, mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kvb import BottleneckedEncoder, CodeDataset, KeyValueBottleneck, training
from kvb.modules import samples
from kvb.unlearning import class_hits, erase, forget, hits, mask_by_activations, mask_by_examples, overlap

C, K, D, V = 3, 8, 2, 4


def make(**options):
    return KeyValueBottleneck(C, K, D, V, **options).freeze_keys()


def by_hand(codes, pairs=K):
    """Histograms of codes [N, C, ...]."""
    found = torch.zeros(codes.shape[1], pairs, dtype=torch.int64)
    for book in range(codes.shape[1]):
        for code in codes[:, book].flatten().tolist():
            found[book, code] += 1
    return found


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before):
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- histograms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_hits_of_codes(shape, dtype):
    codes = torch.randint(K, (20, C, *shape)).to(dtype)
    want = by_hand(codes)
    found = hits(make(), codes)
    assert found.dtype == torch.int64
    assert torch.equal(found, want)
    assert torch.equal(hits(make(), CodeDataset(codes)), want)
    assert torch.equal(hits(make(), list(codes.split(7))), want)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("training", [True, False])
def test_hits_of_inputs_touch_nothing(topk, shape, training):
    module = make(topk=topk).train(training)
    x, labels = torch.randn(20, C, *shape, D), torch.randint(3, (20,))
    want = by_hand(module.encode(x))
    before = state_of(module)
    for data in (x, x.split(6), DataLoader(TensorDataset(x, labels), batch_size=6)):
        assert torch.equal(hits(module, data), want)
    assert unchanged(module, before)
    assert not module.cluster_size_counter.any()
    module.train()(x)
    assert torch.equal(module.cluster_size_counter.long(), want)


def test_hits_leave_learning_keys_alone():
    module = KeyValueBottleneck(C, K, D, V)
    before = state_of(module)
    hits(module, torch.randn(20, C, D))
    assert unchanged(module, before)


def test_inputs_that_are_not_finite_do_not_count():
    module, x = make(), torch.randn(20, C, 5, D)
    x[3, 1, 2, 0], x[4, 0, 1, 1] = torch.nan, torch.inf
    found = hits(module, x)
    assert found.sum(-1).tolist() == [99, 99, 100]
    module(x)
    assert torch.equal(module.cluster_size_counter.long(), found)


def test_hits_respect_a_mask_that_is_there():
    mask = torch.rand(C, K) < 0.5
    mask[:, 0] = True
    found = hits(make().mask_pairs(mask), torch.randn(50, C, D))
    assert not found[~mask].any()


def test_large_tensors_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(samples, "BATCH", 10)
    codes = torch.randint(K, (20, C))
    assert torch.equal(hits(make(), codes), by_hand(codes))
    labels = torch.randint(3, (20,))
    assert torch.equal(class_hits(make(), CodeDataset(codes, labels)).sum(0), by_hand(codes))


@pytest.mark.parametrize("num_classes", [None, 5])
def test_hits_of_every_class(num_classes):
    module, x, labels = make(), torch.randn(30, C, D), torch.randint(3, (30,))
    labels[-1] = 2
    codes = module.encode(x)
    want = torch.stack([by_hand(codes[labels == label]) for label in range(num_classes or 3)])
    loaders = (
        CodeDataset(codes, labels),
        DataLoader(TensorDataset(x, labels.int()), batch_size=7),
        CodeDataset(codes, labels).batches(4),
    )
    for data in loaders:
        assert torch.equal(class_hits(module, data, num_classes), want)


def test_overlap_by_hand():
    per_class = torch.tensor([[[4, 0], [1, 1]], [[0, 2], [3, 1]], [[0, 0], [0, 0]]])
    # Codebook 0: nothing in common; codebook 1: min(.5, .75) + min(.5, .25).
    want = torch.tensor([[1, 0.375, 0], [0.375, 1, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.equal(overlap(per_class), want)


# --- masks ------------------------------------------------------------------------------------------------------------

HITS = torch.tensor([[5, 0, 3, 3], [9, 1, 0, 2]])


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"n": 0}, []),
        ({"n": 1}, [4]),
        ({"n": 3}, [4, 0, 2]),  # of the equal ones, the first
        ({"n": 4}, [4, 0, 2, 3]),
        ({"n": 99}, [4, 0, 2, 3, 7, 5]),  # those without a hit stay
        ({"share": 0.1}, [4]),
        ({"share": 14 / 23}, [4, 0]),
        ({"share": 0.61}, [4, 0, 2]),
        ({"share": 1.0}, [4, 0, 2, 3, 7, 5]),
        ({"n": 2, "retain_hits": torch.tensor([[0, 0, 0, 0], [81, 0, 0, 0]])}, [0, 2]),  # 25/5, 9/3 against 81/90
        ({"n": 1, "retain_hits": torch.zeros(2, 4)}, [4]),
        ({"n": 2, "keep": torch.arange(8).view(2, 4) == 4}, [0]),
    ],
)
def test_masks_by_activations(options, gone):
    mask = mask_by_activations(HITS, **options)
    assert mask.dtype == torch.bool
    assert (~mask).flatten().nonzero()[:, 0].tolist() == sorted(gone)


def test_masks_always_leave_something_to_fetch():
    everything = torch.tensor([[5, 1, 3], [2, 2, 2]])
    assert mask_by_activations(everything, share=1.0).tolist() == [[False, True, False], [True, False, False]]
    module = KeyValueBottleneck(1, 3, D, V)
    examples = torch.tensor([[0], [1], [2], [2], [0]])
    assert mask_by_examples(module, examples).tolist() == [[False, True, False]]


def test_masks_by_examples():
    module, codes = make(), torch.randint(K - 2, (4, C))
    mask = mask_by_examples(module, codes)
    assert torch.equal(mask, by_hand(codes) == 0)
    keep = torch.rand(C, K) < 0.3
    assert torch.equal(mask_by_examples(module, codes, keep=keep), mask | keep)


# --- forgetting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_forgotten_is_not_fetched_and_comes_back_bit_for_bit(earlier):
    module, x = make().eval(), torch.randn(200, C, D)
    first = torch.ones(C, K, dtype=torch.bool)
    first[:, 3] = False
    if earlier:
        module.mask_pairs(first)
    values, before, state = module(x), module.pair_mask, state_of(module)
    codes = module.encode(x)
    mask = mask_by_examples(module, codes[:2])
    undo = forget(module, mask)
    again = module.encode(x)
    assert not (hits(module, again) > 0)[~mask].any()
    assert torch.equal((hits(module, again) > 0)[:, 3].any(), torch.tensor(False)) or not earlier
    fetched = mask[torch.arange(C), codes]
    assert torch.equal(again[fetched], codes[fetched])  # other queries keep their pairs
    assert undo is before is None or torch.equal(undo, before)
    module.mask_pairs(undo)
    assert torch.equal(module(x), values)
    assert unchanged(module, state)


def test_forgetting_twice_adds_up_and_is_saved():
    one, two = (torch.arange(K) != k for k in (1, 2))
    module = make()
    forget(module, one.expand(C, K))
    forget(module, two.expand(C, K))
    assert torch.equal(module.pair_mask, (one & two).expand(C, K))
    other = make()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.pair_mask, module.pair_mask)


def test_erasing_empties_values_and_nothing_else():
    module = make()
    mask = torch.rand(C, K) < 0.5
    before = state_of(module)
    erase(module, mask, fill=0.25)
    assert (module.values[~mask] == 0.25).all()
    assert torch.equal(module.values[mask], before["values"][mask])
    assert module.values.requires_grad
    del before["values"]
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())


def test_erasing_what_is_forgotten_changes_no_output():
    module, x = make(), torch.randn(50, C, D)
    mask = mask_by_examples(module, module.encode(x[:3]))
    forget(module, mask)
    want = module(x)
    erase(module, mask)
    assert torch.equal(module(x), want)
    assert not module.values[~mask].any()


def test_codes_from_before_still_name_what_is_masked():
    module, x = make(), torch.randn(50, C, D)
    codes = module.encode(x)
    want = module.decode(codes)
    forget(module, mask_by_examples(module, codes[:3]))
    assert torch.equal(module.decode(codes), want)
    assert not torch.equal(module.decode(module.encode(x)), want)


def test_masked_pairs_do_not_learn():
    module, x = make(), torch.randn(50, C, D)
    mask = mask_by_examples(module, module.encode(x[:3]))
    forget(module, mask)
    before = module.values.detach().clone()
    training.sgd_step(module.values.detach(), module.encode(x), torch.randint(V, (50,)))
    assert torch.equal(module.values[~mask], before[~mask])
    assert not torch.equal(module.values[mask], before[mask])


def test_the_bottleneck_of_an_encoder():
    sizes = {"num_channels": 6, "num_codebooks": C, "key_value_pairs_per_codebook": K, "dim_keys": D, "dim_values": V}
    model = BottleneckedEncoder(nn.Identity(), **sizes, init_mode="sample")
    x = torch.randn(40, 6)
    model.prepare([x], epochs=0)
    found = hits(model.bottleneck, model.encode_dataset([x], progress=False))
    assert torch.equal(found, by_hand(model.encode(x)))
    with pytest.raises(TypeError, match="got BottleneckedEncoder; give its attribute bottleneck"):
        hits(model, x)


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, C, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hits(nn.Linear(1, 1), GOOD), TypeError, "hits(): expected a KeyValueBottleneck, got Linear"),
        (lambda: hits(make(), 3), TypeError, "data must be a Tensor, a CodeDataset or an iterable"),
        (lambda: hits(make(), ["x"]), TypeError, "argument 'data' must be Tensor, not str"),
        (lambda: hits(make(), GOOD.bool()), TypeError, "expected integer codes, got torch.bool"),
        (lambda: hits(make(), GOOD[:, :2]), ValueError, "expected indices of shape (B, C, *shape)"),
        (lambda: hits(make(), torch.tensor(3)), ValueError, "expected indices of shape (B, C, *shape)"),
        (lambda: hits(make(), torch.randn(2, C, D + 1)), ValueError, "expected x of shape (B, C, *shape, D)"),
        (lambda: hits(make(), GOOD + K), IndexError, f"codes must be in [0, {K}), got {K} to {K}"),
        (lambda: hits(make(), GOOD - 1), IndexError, f"codes must be in [0, {K}), got -1 to -1"),
        (lambda: hits(make(), GOOD[:0]), ValueError, "data yielded no samples"),
        (lambda: hits(KeyValueBottleneck(C, K, D, V, "sample"), torch.randn(2, C, D)), RuntimeError, "not initialised"),
        (lambda: class_hits(make(), GOOD), ValueError, "class_hits() needs labels"),
        (lambda: class_hits(make(), CodeDataset(GOOD)), ValueError, "class_hits() needs labels"),
        (lambda: class_hits(make(), [(GOOD, torch.rand(2))]), TypeError, "expected integer labels"),
        (lambda: class_hits(make(), [(GOOD, torch.ones(3).long())]), ValueError, "expected labels of shape (B) = (2)"),
        (
            lambda: class_hits(make(), [(GOOD, torch.tensor([0, 3]))], 3),
            ValueError,
            "labels must be in [0, 3), got 0 to 3",
        ),
        (lambda: class_hits(make(), [(GOOD, -GOOD[:, 0] - 1)]), ValueError, "got -1 to -1"),
        (lambda: class_hits(make(), [(GOOD, GOOD[:, 0])], 0), ValueError, "num_classes must be a positive integer"),
        (lambda: overlap(HITS), ValueError, "expected per_class of shape (L, C, K)"),
        (lambda: mask_by_activations(HITS), ValueError, "give one of n and share, got n=None and share=None"),
        (lambda: mask_by_activations(HITS, 1, share=0.5), ValueError, "give one of n and share, got n=1 and share=0.5"),
        (lambda: mask_by_activations(HITS, -1), ValueError, "n must be an integer >= 0, got -1"),
        (lambda: mask_by_activations(HITS, 0.5), ValueError, "n must be an integer >= 0, got 0.5"),
        (lambda: mask_by_activations(HITS, share=1.5), ValueError, "share must be in (0, 1], got 1.5"),
        (lambda: mask_by_activations(HITS, share=0), ValueError, "share must be in (0.0, inf), got 0"),
        (lambda: mask_by_activations(HITS[0], 1), ValueError, "expected forget_hits of shape (C, K)"),
        (lambda: mask_by_activations(-HITS, 1), ValueError, "forget_hits holds negative or NaN counts"),
        (lambda: mask_by_activations(HITS > 0, 1), TypeError, "expected forget_hits to be counts, got torch.bool"),
        (lambda: mask_by_activations([1], 1), TypeError, "argument 'forget_hits' must be Tensor"),
        (
            lambda: mask_by_activations(HITS, 1, retain_hits=HITS[:1]),
            ValueError,
            "expected retain_hits of shape (C, K) = (2, 4), got (1, 4)",
        ),
        (lambda: mask_by_activations(HITS, 1, keep=HITS), TypeError, "keep must be torch.bool"),
        (lambda: mask_by_examples(make(), GOOD, keep=HITS > 0), ValueError, "expected keep of shape (C, K) = (3, 8)"),
        (lambda: forget(make(), HITS > 0), ValueError, "expected mask of shape (C, K) = (3, 8), got (2, 4)"),
        (lambda: forget(make(), torch.ones(C, K)), TypeError, "forget(): mask must be torch.bool"),
        (lambda: forget(nn.Linear(1, 1), HITS > 0), TypeError, "forget(): expected a KeyValueBottleneck, got Linear"),
        (lambda: erase(make(), HITS > 0), ValueError, "expected mask of shape (C, K) = (3, 8), got (2, 4)"),
        (lambda: erase(make(), torch.ones(C, K).bool(), float("nan")), ValueError, "fill must be in (-inf, inf)"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_mask_that_leaves_nothing_is_refused_and_changes_nothing():
    module, mask = make(), torch.ones(C, K, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="leaves no pair to fetch in 1 of 3 codebooks, the first of them 1"):
        forget(module, mask)
    assert module.pair_mask is None
    half = torch.arange(K).expand(C, K) < 4
    forget(module, half)
    with pytest.raises(ValueError, match="in 3 of 3 codebooks"):
        forget(module, ~half)
    assert torch.equal(module.pair_mask, half)


def test_a_mask_of_all_counted_pairs_is_refused():
    module, x = make(), torch.randn(1, C, D)
    module(x)
    module.deactivate_counts()
    with pytest.raises(ValueError, match="leaves no pair to fetch in 3 of 3 codebooks"):
        forget(module, mask_by_examples(module, x))
    assert module.pair_mask is None


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_padding_is_no_hit(topk, shape):
    module = KeyValueBottleneck(3, 7, 4, 2, topk=topk).freeze_keys().eval()
    x, mask = torch.randn(20, 3, *shape, 4), torch.rand(20, *shape) < 0.4
    labels = torch.randint(4, (20,))
    data = module.encode_dataset([(x, labels, mask)], mask_extractor=lambda item: item[2], progress=False)
    alone = x.movedim(1, -2)[mask]
    assert torch.equal(hits(module, data), hits(module, alone))
    of_each = labels.view(-1, *[1] * len(shape)).expand(mask.shape)[mask]
    per_class = class_hits(module, data, 4)
    assert torch.equal(per_class, class_hits(module, [(alone, of_each)], 4))


@pytest.mark.parametrize("labelled", [False, True])
def test_batches_of_a_data_set_say_what_counts(labelled):
    module = KeyValueBottleneck(2, 5, 3, 4).freeze_keys()
    mask, labels = torch.rand(6, 7) < 0.5, torch.arange(6) % 3
    data = CodeDataset(torch.randint(5, (6, 2, 7)), labels if labelled else None, mask)
    loader = DataLoader(data, batch_size=4)
    assert torch.equal(hits(module, loader), hits(module, data))
    assert torch.equal(hits(module, data.batches(4)), hits(module, data))
    if labelled:
        assert torch.equal(class_hits(module, loader, 3), class_hits(module, data, 3))
    else:
        with pytest.raises(ValueError, match="needs labels"):
            class_hits(module, loader)
