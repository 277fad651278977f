"""state_dict, copies, conversions: nothing is lost, nothing half loaded, no stale packed keys."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import kvb
from kvb import KeyValueBottleneck

pytestmark = pytest.mark.fallback

PUBLISHED = ("values", "initted", "cluster_size", "cluster_size_counter", "keys_avg", "keys")


def make(**options):
    return KeyValueBottleneck(2, 9, 3, 4, **options)


def published(module):
    return {name: value for name, value in module.state_dict().items() if name in PUBLISHED}


def fetched(module, x):
    """The indices the module finds, and the ones its keys imply."""
    found = module.encode(x)
    exact = (x[..., None, :].double() - module.keys.double()).square().sum(-1).argmin(-1)
    return found, exact


def test_names_shapes_and_dtypes_are_the_published_ones():
    state = make().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "values": (2, 9, 4),
        "initted": (1,),
        "cluster_size": (2, 9),
        "cluster_size_counter": (2, 9),
        "keys_avg": (2, 9, 3),
        "keys": (2, 9, 3),
        "kvb_flags": (3,),
        "kvb_mask": (2, 9),
    }
    dtypes = dict.fromkeys(state, torch.float32) | {"cluster_size_counter": torch.int64}
    assert {name: value.dtype for name, value in state.items()} == dtypes
    assert [name for name, _ in make().named_parameters()] == ["values"]


def test_published_state_dict_loads_strict_and_keeps_the_flags():
    source, target = make(), make().freeze_keys()
    target.load_state_dict(published(source), strict=True)
    assert not target.update_keys
    for name in PUBLISHED:
        assert torch.equal(getattr(target, name), getattr(source, name))


def test_published_uninitialised_state_waits_for_data():
    target = make()
    target.load_state_dict(published(make(init_mode="kmeans")))
    with pytest.raises(RuntimeError, match="keys are not initialised"):
        target.eval()(torch.randn(4, 2, 3))
    target.train()(torch.randn(40, 2, 3))
    assert target.initted.item() == 1


def test_state_dict_restores_learning_counting_and_mask():
    source = make().freeze_keys()
    source(torch.randn(20, 2, 3))
    mask = torch.rand(2, 9) < 0.5
    source.deactivate_counts().mask_pairs(mask)
    for target in (make(), make(init_mode="kmeans")):
        target.load_state_dict(source.state_dict())
        assert not target.update_keys
        assert not target.count_cluster_size
        assert torch.equal(target.pair_mask, mask)
        x = torch.randn(50, 2, 3)
        assert torch.equal(target.encode(x), source.encode(x))
        target.load_state_dict(make().state_dict())
        assert target.update_keys
        assert target.count_cluster_size
        assert target.pair_mask is None
    waiting = make()
    waiting.load_state_dict(make(init_mode="kmeans").state_dict())
    assert "not initialised" in repr(waiting)


def test_state_survives_torch_save_with_weights_only_and_nesting():
    model = nn.Sequential(nn.Identity(), make().freeze_keys().mask_pairs(torch.arange(18).view(2, 9) > 3))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = nn.Sequential(nn.Identity(), make())
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert not twin[1].update_keys
    assert torch.equal(twin[1].pair_mask, model[1].pair_mask)
    twin[1].load_state_dict(model[1].state_dict(), assign=True)
    x = torch.randn(30, 2, 3)
    assert torch.equal(twin(x), model(x))


# --- all or nothing ---------------------------------------------------------------------------------------------------


def broken_states():
    def state(**changes):
        good = make().state_dict()
        for name, value in changes.items():
            good[name] = value
        return good

    keys = torch.randn(2, 9, 3)
    keys[0, 1] = float("nan")
    flags = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.uint8)  # of kvb 0.1
    newer, bent, long = flags.clone(), flags.clone(), torch.cat([flags, flags])
    newer[0], bent[2] = 9, 7
    yield state(values=torch.zeros(2, 9, 5)), r"size mismatch for values: copying a param with shape .*\[2, 9, 5\]"
    yield state(keys=keys), "keys contains NaN or Inf in 1 of 18 pairs"
    yield state(keys_avg=keys), "keys_avg contains NaN or Inf in 1 of 18 pairs"
    yield state(cluster_size=-torch.ones(2, 9)), "cluster_size holds negative or NaN counts"
    yield state(cluster_size_counter=torch.full((2, 9), float("nan"))), "cluster_size_counter holds negative or NaN"
    yield state(cluster_size_counter=torch.full((2, 9), 2.0**63)), "cluster_size_counter holds negative or NaN"
    yield state(values="no tensor"), 'While copying "values", expected torch.Tensor'
    yield state(kvb_state=newer), "kvb_state has version 9, but this kvb reads version 1: upgrade kvb"
    yield state(kvb_state=bent), "kvb_state is damaged"
    yield state(kvb_state=long), "kvb_state is damaged"
    yield state(kvb_state=flags[:3]), "expected kvb_state of at least 8 bytes"
    yield (
        state(kvb_flags=torch.tensor([9.0, 1, 1])),
        "kvb_flags has version 9, but this kvb reads version 2: upgrade kvb",
    )
    yield state(kvb_flags=torch.tensor([2.0, 7, 1])), "kvb_flags is damaged"
    yield state(kvb_flags=torch.ones(4)), "size mismatch for kvb_flags"
    yield state(kvb_mask=torch.ones(2, 8)), "size mismatch for kvb_mask"


@pytest.mark.parametrize(("state", "message"), list(broken_states()))
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_that_does_not_fit_changes_nothing(state, message, nested):
    module = make().freeze_keys()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    target = nn.ModuleDict({"inner": module}) if nested else module
    if nested:
        state = {f"inner.{name}": value for name, value in state.items()}
        message = message.replace('"values"', '"(inner.)?values"')
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_missing_and_surplus_names_change_nothing():
    module, state = make(), make().state_dict()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    del state["values"]
    state["surplus"] = torch.zeros(1)
    message = (
        r'Error.s. in loading state_dict for KeyValueBottleneck:\n\tMissing .*: "values"[^$]*Unexpected .*"surplus"'
    )
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for left_out in ("strict", "nested"):
        if left_out == "strict":
            module.load_state_dict(state, strict=False)
        else:
            with pytest.raises(RuntimeError, match='Missing key.s. in state_dict: "inner.values"'):
                nn.ModuleDict({"inner": module}).load_state_dict({f"inner.{k}": v for k, v in state.items()})


def test_partial_states_load_when_not_strict():
    module = make()
    keys = torch.randn(2, 9, 3)
    result = module.load_state_dict({"keys": keys, "other": torch.zeros(1)}, strict=False)
    assert torch.equal(module.keys, keys)
    assert "values" in result.missing_keys
    assert result.unexpected_keys == ["other"]


# --- packed keys ------------------------------------------------------------------------------------------------------


NEW = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))


def by_inference(module):
    with torch.inference_mode():
        module.keys.copy_(NEW)
    return module


def by_assign(module):
    module.keys = NEW.clone()
    return module


def by_data(module):
    module.keys.data.copy_(NEW)
    return module.refresh_keys()


def by_loaded(module):
    state = module.state_dict()
    state["keys"] = NEW
    module.load_state_dict(state)
    return module


def by_loaded_by_assignment(module):
    state = {**module.state_dict(), "keys": NEW.clone()}
    module.load_state_dict(state, assign=True)
    return module


def by_in_place(module):
    module.keys.mul_(-1)
    return module


def by_learned(module):
    module.unfreeze_keys().train()(torch.randn(100, 2, 3) + 3)
    return module.freeze_keys()


def by_initialised(module):
    module.unfreeze_keys().init_keys(torch.randn(100, 2, 3), "kmeans", progress=False)
    return module.freeze_keys()


def by_copied(module):
    twin = copy.deepcopy(module)
    twin.keys.mul_(-1)
    return twin


def by_pickled(module):
    return pickle.loads(pickle.dumps(module))


def by_half(module):
    return module.half()


def by_double(module):
    return module.double()


def by_moved(module):
    return module.to("cpu", torch.float64).to(torch.float32)


def by_emptied(module):
    module = module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        module.keys.copy_(NEW)
    return module


CHANGES = [
    by_inference,
    by_assign,
    by_data,
    by_loaded,
    by_loaded_by_assignment,
    by_in_place,
    by_learned,
    by_initialised,
    by_copied,
    by_pickled,
    by_half,
    by_double,
    by_moved,
    by_emptied,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_packed_keys_are_never_stale(change):
    module = make().freeze_keys().eval()
    x = torch.randn(200, 2, 3)
    module.encode(x)
    found, exact = fetched(change(module), x)
    assert torch.equal(found, exact)


def test_a_module_built_in_inference_mode_works_and_is_never_stale():
    with torch.inference_mode():
        module = make().freeze_keys().eval()
        x = torch.randn(200, 2, 3)
        module.encode(x)
        module.keys.mul_(-1)
        assert torch.equal(*fetched(module, x))


def test_frozen_keys_are_packed_once():
    module = make().freeze_keys().eval()
    first = module._packed_keys()[1]
    module(torch.randn(5, 2, 3))
    with torch.inference_mode():
        module(torch.randn(5, 2, 3))
    assert module._packed_keys()[1] is first


def test_packed_keys_are_in_no_copy():
    module = make().freeze_keys()
    module(torch.randn(4, 2, 3))
    assert module._packed._kept is not None
    assert copy.deepcopy(module)._packed._kept is None
    assert pickle.loads(pickle.dumps(module))._packed._kept is None
    assert not any("packed" in name for name, _ in [*module.named_buffers(), *module.state_dict().items()])


@pytest.mark.parametrize("mode", ["random", "kmeans"])
def test_copies_keep_everything(mode):
    module = make(init_mode=mode, topk=2)
    if mode == "random":
        module.freeze_keys().mask_pairs(torch.rand(2, 9) < 0.8)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert repr(twin) == repr(module)
        for name, value in module.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value)
        if mode == "random":
            x = torch.randn(20, 2, 3)
            assert torch.equal(twin.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cluster_size", torch.inf, "cluster_size holds negative or NaN counts, or infinite ones"),
        ("keys", 1e39, "keys contains NaN or Inf in 1 of 18 pairs as torch.float32"),
        ("keys_avg", -1e300, "keys_avg contains NaN or Inf in 1 of 18 pairs as torch.float32"),
    ],
)
def test_numbers_that_become_infinite_on_loading_are_refused(name, value, message, tmp_path):
    module = make()
    before = {key: entry.clone() for key, entry in module.state_dict().items()}
    state = {key: entry.double() if key == name else entry for key, entry in make().state_dict().items()}
    state[name].view(-1)[0] = value
    torch.save(state, tmp_path / "file.pt")
    for load in (lambda: module.load_state_dict(state), lambda: kvb.load(module, tmp_path / "file.pt")):
        with pytest.raises(RuntimeError, match=message):
            load()
        assert all(torch.equal(entry, before[key]) for key, entry in module.state_dict().items())
