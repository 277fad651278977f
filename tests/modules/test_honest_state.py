"""The whole state is in buffers: whatever copies, averages, replaces or reloads them gives the same module."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kvb import BottleneckedEncoder, KeyValueBottleneck
from kvb.modules import streams

pytestmark = pytest.mark.fallback

MASK = torch.arange(18).view(2, 9) % 3 > 0


def make(**options):
    return KeyValueBottleneck(2, 9, 3, 4, **options)


def masked():
    """Frozen, restricted to counted pairs, masked."""
    module = make()
    module(torch.randn(200, 2, 3))
    module.freeze_keys()(torch.randn(30, 2, 3))
    return module.deactivate_counts().mask_pairs(MASK)


def same(one, other):
    x = torch.randn(200, 2, 3)
    flags = [(m.keys_frozen, m.count_cluster_size, m.keys_initialised) for m in (one, other)]
    masks = [m.pair_mask for m in (one, other)]
    alike = masks[0] is masks[1] is None or torch.equal(*masks)
    return flags[0] == flags[1] and alike and torch.equal(one.eval()(x), other.eval()(x))


def test_every_name_of_the_state_is_an_attribute_of_fixed_size():
    waiting, full = make(init_mode="kmeans").state_dict(), masked().state_dict()
    assert {name: value.shape for name, value in waiting.items()} == {name: value.shape for name, value in full.items()}
    module = masked()
    for name, value in module.state_dict().items():
        assert torch.equal(getattr(module, name), value)
    assert dict(module.named_buffers()).keys() | {"values"} == full.keys()


# --- copies -----------------------------------------------------------------------------------------------------------


def by_buffers(source, target):
    with torch.no_grad():
        for mine, theirs in zip(
            [*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True
        ):
            mine.copy_(theirs)


def by_data(source, target):
    """As old recipes of moving averages do it, which PyTorch does not count as writing."""
    for mine, theirs in zip(
        [*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True
    ):
        mine.data.copy_(theirs.data)


def by_replacing(source, target):
    """As large models are loaded: one tensor after the other takes the place of what is there."""
    for name, value in source.state_dict().items():
        if name in target._parameters:
            target._parameters[name] = nn.Parameter(value.clone())
        else:
            target._buffers[name] = value.clone()


def by_setting(source, target):
    for name, value in source.state_dict().items():
        setattr(target, name, nn.Parameter(value.clone()) if name in target._parameters else value.clone())


def by_loading_in_place(source, target):
    state = target.state_dict()
    for name, value in source.state_dict().items():
        state[name].copy_(value)
    target.load_state_dict(state)


def by_loading(source, target):
    target.load_state_dict(source.state_dict())


def by_assignment(source, target):
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, assign=True)


def by_distributed_state(source, target):
    from torch.distributed.checkpoint import state_dict as helpers

    helpers.set_model_state_dict(target, copy.deepcopy(helpers.get_model_state_dict(source)))


def by_averaging(source, target):
    average = AveragedModel(target)
    average.module = target
    average.update_parameters(source)


def by_averaging_of_equal_models(source, target):
    states = [source.state_dict() for _ in range(3)]
    target.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})


def by_moving_average(source, target):
    by_buffers(source, target)
    state = target.state_dict()
    for name, value in source.state_dict().items():
        state[name].copy_(state[name] * 0.999 + value * (1 - 0.999))


WAYS = [value for name, value in dict(globals()).items() if name.startswith("by_")]


@pytest.mark.parametrize(
    "to", [make, lambda: make(init_mode="kmeans"), lambda: masked().mask_pairs(~MASK)], ids=["new", "waiting", "used"]
)
@pytest.mark.parametrize("source", [make, masked, lambda: make(init_mode="kmeans")], ids=["new", "masked", "waiting"])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_copy_of_the_buffers_is_a_copy_of_the_module(way, source, to):
    mine, theirs = source(), to()
    if theirs.keys_initialised:
        theirs.eval()(torch.randn(5, 2, 3))
    way(mine, theirs)
    if mine.keys_initialised:
        if way is not by_moving_average and way is not by_averaging_of_equal_models:
            assert same(mine, theirs)
        assert theirs.keys_frozen == mine.keys_frozen
        assert theirs.count_cluster_size == mine.count_cluster_size
        assert theirs.keys_initialised
        assert torch.equal(theirs.kvb_mask, mine.kvb_mask)
        theirs.eval()(torch.randn(5, 2, 3))
    else:
        assert not theirs.keys_initialised
        with pytest.raises(RuntimeError, match="keys are not initialised"):
            theirs.eval()(torch.randn(5, 2, 3))


def test_a_mask_of_bools_could_not_be_averaged():
    """Why ``kvb_mask`` is float32: where this passes for bools, it may become one."""
    model = masked()
    AveragedModel(model, use_buffers=True).update_parameters(model)
    model.register_buffer("mask", MASK)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="two bool tensors is not supported"):
        average.update_parameters(model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_an_average_made_before_kmeans_follows(use_buffers, ema):
    model = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(-1, (2, 3)), make(init_mode="kmeans"))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None, use_buffers=use_buffers)
    for _ in range(5):
        model(torch.randn(200, 6))
        average.update_parameters(model)
    model[2].freeze_keys()
    model(torch.randn(200, 6))
    for _ in range(12):  # until most of the average is frozen
        average.update_parameters(model)
    assert average.module[2].keys_frozen
    assert average.module[2].keys_initialised
    average.eval()(torch.randn(5, 6))


def test_meta_and_empty_then_published_names_by_assignment():
    source = make()
    published = {name: value for name, value in source.state_dict().items() if not name.startswith("kvb_")}
    with torch.device("meta"):
        target = make()
    target.load_state_dict(published, assign=True)
    assert {buffer.device.type for buffer in target.buffers()} == {"cpu"}
    assert same(source, target)
    target = make().to("meta").to_empty(device="cpu")
    target.load_state_dict(published)
    assert same(source, target)


def test_dcp_goes_both_ways(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    source, target = masked(), make()
    dcp.save(source.state_dict(), checkpoint_id=tmp_path / "dcp")
    state = target.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    target.load_state_dict(state)
    assert same(source, target)


# --- files of kvb 0.1 -------------------------------------------------------------------------------------------------


def of_version_1(module):
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("kvb_")}
    state["cluster_size_counter"] = state["cluster_size_counter"].float()
    mask = module.pair_mask
    header = [1, module.keys_initialised, not module.keys_frozen, module.count_cluster_size, mask is not None, 0, 0, 0]
    bits = []
    if mask is not None:
        padded = mask.flatten().tolist() + [False] * (-mask.numel() % 8)
        bits = [sum(bit << place for place, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)]
    state["kvb_state"] = torch.tensor([int(part) for part in header] + bits, dtype=torch.uint8)
    return state


@pytest.mark.parametrize("source", [make, masked, lambda: make(init_mode="kmeans")], ids=["new", "masked", "waiting"])
@pytest.mark.parametrize("nested", [False, True])
def test_states_of_version_1_load(source, nested):
    mine, theirs = source(), masked().mask_pairs(~MASK)
    state = of_version_1(mine)
    if nested:
        nn.Sequential(theirs).load_state_dict({f"0.{name}": value for name, value in state.items()})
    else:
        theirs.load_state_dict(state)
    if mine.keys_initialised:
        assert same(mine, theirs)
    assert theirs.keys_initialised == mine.keys_initialised


def test_modules_pickled_by_version_1_load():
    source = masked()
    old = copy.deepcopy(source)
    state = old.__getstate__()
    flags = state["_buffers"].pop("kvb_flags"), state["_buffers"].pop("kvb_mask")
    state["_buffers"] |= {"pair_mask": flags[1], "cluster_size_counter": old.cluster_size_counter.float()}
    state["_non_persistent_buffers_set"] = {"pair_mask"}
    state |= {"update_keys": False, "count_cluster_size": False}
    for name in ("_learning", "_counting", "_packed", "_masked", "_fewest", "_usable", "_seen", "_versions", "_held"):
        state.pop(name, None)
    twin = KeyValueBottleneck.__new__(KeyValueBottleneck)
    twin.__setstate__(state)
    assert same(source, twin)
    assert twin.state_dict().keys() == source.state_dict().keys()


# --- subclasses and hooks ---------------------------------------------------------------------------------------------


class WithChild(KeyValueBottleneck):
    def __init__(self):
        super().__init__(2, 9, 3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("extra", torch.randn(3))
        self.note = {"steps": 3}

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


@pytest.mark.parametrize("strict", [True, False])
def test_a_subclass_with_a_child_and_extra_state_loads_its_own(strict):
    source, target = WithChild(), WithChild()
    source.note = {"steps": 7}
    target.load_state_dict(source.state_dict(), strict=strict)
    assert target.note == {"steps": 7}
    for name, value in source.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(target.state_dict()[name], value)
    nested = nn.Sequential(WithChild())
    nested.load_state_dict(nn.Sequential(source).state_dict())
    assert torch.equal(nested[0].head.weight, source.head.weight)


def test_names_missing_or_left_over_in_a_subclass_change_nothing():
    target = WithChild()
    before = copy.deepcopy(target.state_dict())
    for change in ("extra", "values"):
        state = WithChild().state_dict()
        del state[change]
        with pytest.raises(RuntimeError, match=f'Missing key.s. in state_dict: "{change}"'):
            target.load_state_dict(state)
        own = {name: value for name, value in target.state_dict().items() if "." not in name and name != "_extra_state"}
        assert all(torch.equal(value, before[name]) for name, value in own.items())
    with pytest.raises(RuntimeError, match='Unexpected key.s. in state_dict: "stranger.weight", "surplus"'):
        target.load_state_dict({**WithChild().state_dict(), "surplus": torch.ones(1), "stranger.weight": torch.ones(1)})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("change", ["shape", "missing"])
def test_a_child_that_does_not_fit_changes_nothing(change, strict, assign):
    target, state = WithChild(), WithChild().freeze_keys().state_dict()
    state["_extra_state"] = {"steps": 7}
    before, tensors = copy.deepcopy(target.state_dict()), [*target.parameters(), *target.buffers()]
    if change == "shape":
        state["head.weight"], message = torch.zeros(3, 3), "size mismatch for head.weight"
    else:
        del state["head.weight"]
        message = 'Missing key.s. in state_dict: "head.weight"'
    with pytest.raises(RuntimeError, match=message) if strict or change == "shape" else contextlib.nullcontext():
        target.load_state_dict(state, strict=strict, assign=assign)
    if strict or change == "shape":
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items() if name[0] != "_")
        assert all(map(lambda a, b: a is b, tensors, [*target.parameters(), *target.buffers()]))
        assert target.note == {"steps": 3}
    assert target.keys_frozen == (change == "missing" and not strict)


@pytest.mark.parametrize("masked", [0, 1])
def test_a_default_device_does_not_matter_to_flags_and_masks(masked):
    module, old = make(init_mode="kmeans"), make().state_dict()
    for name in ("kvb_flags", "kvb_mask"):
        del old[name]
    old["kvb_state"] = torch.tensor([1, 1, 1, 0, masked, 0, 0, 0, *[255, 255, 3] * masked], dtype=torch.uint8)
    data = torch.randn(90, 2, 3)
    torch.set_default_device("meta")
    try:
        module.init_keys([data], method="sample")
        module.freeze_keys().mask_pairs(torch.ones(2, 9, dtype=torch.bool, device="cpu")).mask_pairs(None)
        module.reset_cluster_size_counter()
        assert module.keys_frozen
        assert module.keys_initialised
        module.load_state_dict(old)
    finally:
        torch.set_default_device(None)
    assert not module.keys_frozen
    assert not module.count_cluster_size
    assert module.pair_mask is None


@pytest.mark.parametrize("nested", [False, True])
def test_hooks_that_rename_run_before_the_checks(nested):
    source, target = masked(), make()

    def rename(module, state_dict, prefix, *rest):
        for old, new in (("codebook", "keys"), ("codebook_avg", "keys_avg")):
            state_dict[prefix + new] = state_dict.pop(prefix + old)

    target.register_load_state_dict_pre_hook(rename)
    state = source.state_dict()
    state["codebook"], state["codebook_avg"] = state.pop("keys"), state.pop("keys_avg")
    root = nn.ModuleDict({"inner": target}) if nested else target
    root.load_state_dict({f"inner.{name}": value for name, value in state.items()} if nested else state)
    assert same(source, target)
    assert len(target._load_state_dict_pre_hooks) == 1


def test_hooks_of_users_may_be_many_and_loading_twice_is_fine():
    target, seen = make(), []
    for number in range(3):
        target.register_load_state_dict_pre_hook(lambda *args, number=number: seen.append(number))
    target.load_state_dict(make().state_dict())
    target.load_state_dict(make().state_dict())
    assert seen == [0, 1, 2] * 2


# --- init_keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "sample", "kmeans", "kmeans++"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_init_keys_that_fails_at_any_item_changes_nothing(method, wrapped):
    """A loader that breaks: at the first item, at the last, in the first pass, in a later one."""
    module = (
        BottleneckedEncoder(nn.Identity(), 6, 2, 9, 3, 4, threshold_ema_dead_code=0.5)
        if wrapped
        else make(threshold_ema_dead_code=0.5)
    )
    shape = (6,) if wrapped else (2, 3)
    module(torch.randn(40, *shape))
    before = copy.deepcopy(module.state_dict())

    class Loader:
        def __init__(self, good):
            self.good = good

        def __iter__(self):
            for _ in range(4):
                if self.good == 0:
                    raise OSError("the disk is gone")
                self.good -= 1
                yield torch.randn(60, *shape)

    failed = 0
    for good in range(60):
        try:
            module.init_keys(Loader(good), method, epochs=2, progress=False)
            break
        except OSError:
            failed += 1
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
            assert module.encode(torch.randn(5, *shape)).shape == (5, 2)
    assert failed >= 8


def test_a_first_batch_that_fails_leaves_keys_waiting():
    module = make(init_mode="kmeans")
    with pytest.raises(ValueError, match="without a single finite row"):
        module(torch.full((20, 2, 3), torch.nan))
    assert not module.keys_initialised
    module(torch.randn(200, 2, 3))
    assert module.keys_initialised


@pytest.mark.parametrize("method", ["random", "sample", "kmeans", "kmeans++"])
def test_a_generator_makes_init_keys_reproducible(method):
    """Also the queries that replace dead keys."""
    data = torch.randn(300, 2, 3)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = make(init_mode="kmeans", threshold_ema_dead_code=5.0)
        generator = torch.Generator().manual_seed(7)
        module.init_keys(list(data.split(50)), method, epochs=2, generator=generator, progress=False)
        found.append([getattr(module, name) for name in ("keys", "keys_avg", "cluster_size")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    before = torch.random.get_rng_state()
    make(init_mode="kmeans").load_state_dict(module.state_dict())
    module.init_keys(data, method, generator=torch.Generator().manual_seed(7), progress=False)
    torch.random.set_rng_state(before)


def test_init_keys_with_a_generator_leaves_the_global_one_alone():
    module = make(init_mode="kmeans", threshold_ema_dead_code=5.0)
    before = torch.random.get_rng_state()
    module.init_keys(torch.randn(300, 2, 3, generator=torch.Generator()), generator=torch.Generator(), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_of_streams_are_read_again():
    calls = []
    batches = list(torch.randn(4, 10, 2, 3))
    stream = streams.Stream(
        batches,
        lambda item: calls.append(1) or streams.Part(item, None),
        lambda part: part.made[:, None],
        passes=1,
        progress=False,
    )
    sample = stream.share(15, None)
    assert sum(len(q) for q in sample.queries("first")) == 15
    assert sum(len(q) for q in sample.queries("second")) == 15
    assert len(calls) == 4
    assert sum(len(q) for q in stream.queries("all")) == 40
