"""What ``kvb.load`` leaves behind: a module with its own tensors and the file's numbers, or everything as it was."""

from __future__ import annotations

import pytest
import torch
from saved_models import FORMATS, make, same, snapshot, trained
from torch import nn

import kvb
from kvb import CheckpointError, KeyValueBottleneck, checkpoints


class Turned(nn.Linear):
    """Holds another weight than it saves, and says so in loading code of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].T

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].T
        super()._load_from_state_dict(state_dict, prefix, *rest)


def hooked():
    def raise_bias(module, keys):
        module.bias.detach().add_(1)

    module = nn.Linear(6, 6)
    module.register_load_state_dict_post_hook(raise_bias)
    return module


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "make_part",
    [
        *(lambda: nn.Linear(6, 6), lambda: Turned(6, 6), lambda: nn.BatchNorm1d(6), lambda: nn.PReLU(), hooked),
        lambda: nn.Linear(6, 6).half(),
        lambda: nn.Conv2d(6, 6, 3).to(memory_format=torch.channels_last),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda: nn.LazyBatchNorm1d(),
        lambda: KeyValueBottleneck(2, 9, 3, 4, init_mode="kmeans"),
    ],
)
def test_a_module_keeps_its_tensors(name, make_part, tmp_path):
    """What optimizers and other modules hold stays what they hold, as with ``load_state_dict``."""
    source, target, other = make_part(), make_part(), make_part()
    for lazy in (source, target, other):
        if isinstance(lazy, nn.LazyBatchNorm1d):
            lazy(torch.randn(4, 6))
    kvb.save(source, tmp_path / name)
    held = [*target.parameters(), *target.buffers()]
    places, kinds = [tensor.data_ptr() for tensor in held], [(tensor.dtype, tensor.stride()) for tensor in held]
    other.load_state_dict(checkpoints.read_state(tmp_path / name))
    assert same(snapshot(kvb.load(target, tmp_path / name)), snapshot(other))
    now = [*target.parameters(), *target.buffers()]
    assert all(map(lambda a, b: a is b, held, now))
    assert [tensor.data_ptr() for tensor in now] == places
    assert [(tensor.dtype, tensor.stride()) for tensor in now] == kinds


def test_tied_tensors_in_modules_and_in_files(tmp_path):
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    tied, apart = nn.ModuleList([one, nn.Linear(4, 4)]), nn.ModuleList([two, nn.Linear(4, 4)])
    tied[1].weight = one.weight
    torch.save(tied.state_dict(), tmp_path / "tied")  # which holds the weight once
    kvb.load(apart, tmp_path / "tied")
    assert torch.equal(apart[0].weight, one.weight)
    assert torch.equal(apart[1].weight, one.weight)
    assert apart[0].weight.data_ptr() != apart[1].weight.data_ptr()
    kvb.save(apart, tmp_path / "apart")
    with torch.no_grad():
        one.weight.zero_()
    kvb.load(tied, tmp_path / "apart")
    kvb.load(tied, tmp_path / "tied")
    assert torch.equal(one.weight, apart[0].weight)
    assert tied[1].weight is one.weight
    torch.save({"weight": torch.ones(1).expand(4, 4), "bias": torch.arange(8.0)[::2]}, tmp_path / "strided")
    kvb.load(one, tmp_path / "strided")
    assert one.weight.eq(1).all()
    assert one.bias.tolist() == [0, 2, 4, 6]
    shared = torch.arange(20.0)
    torch.save({"weight": shared[4:].view(4, 4), "bias": shared[2:6]}, tmp_path / "overlapping")
    kvb.load(one, tmp_path / "overlapping")
    assert one.weight.flatten().tolist() == list(range(4, 20))
    assert one.bias.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_on_the_meta_device_gets_memory(name, tmp_path):
    source = trained()
    kvb.save(source, tmp_path / name)
    with torch.device("meta"):
        target = make()
    kvb.load(target, tmp_path / name)
    assert same(snapshot(target), snapshot(source))
    assert all(isinstance(part, nn.Parameter) and part.requires_grad for part in target.parameters())
    assert not target[-1].update_keys
    x = torch.randn(9, 6)
    assert torch.equal(source.eval()(x), target.eval()(x))


@pytest.mark.parametrize("part", ["weight", "keys"])
def test_a_failure_between_two_tensors_is_undone(part, tmp_path, monkeypatch):
    """Out of memory, say, where half of the tensors have their new content."""
    source, module = trained(), trained()
    kvb.save(source, tmp_path / "file.pt")
    before, tensors = snapshot(module), [*module.parameters(), *module.buffers()]
    swap, last = checkpoints._Former._swap, getattr(module[0 if part == "weight" else -1], part)

    def failing(self, tensor, given):
        swap(self, tensor, given)
        if tensor is last:
            raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(checkpoints._Former, "_swap", failing)
    with pytest.raises(CheckpointError, match="does not fit Sequential: not enough"):
        kvb.load(module, tmp_path / "file.pt")
    assert same(snapshot(module), before)
    assert all(map(lambda a, b: a is b, tensors, [*module.parameters(), *module.buffers()]))
    x = torch.randn(50, 2, 3)
    exact = (x[..., None, :] - module[-1].keys).square().sum(-1)
    exact[:, ~module[-1].pair_mask] = torch.inf
    assert torch.equal(module[-1].encode(x), exact.argmin(-1))


def test_a_module_that_fails_halfway_is_put_back(tmp_path):
    class Late(nn.Module):
        """Loads after everything else, and refuses."""

        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(1))

        def _load_from_state_dict(self, *arguments):
            raise OverflowError("not today")

    kvb.save(nn.Sequential(*make(), nn.Module()), tmp_path / "first")
    state = torch.load(tmp_path / "first", weights_only=True)["state_dict"]
    torch.save({**state, "4.last": torch.ones(1)}, tmp_path / "file")
    module = nn.Sequential(*trained(), Late())
    before, learning, buffers = snapshot(module), module[3].update_keys, dict(module[3]._buffers)
    with pytest.raises(OverflowError, match="not today"):
        kvb.load(module, tmp_path / "file")
    assert same(snapshot(module), before)
    assert module[3].update_keys == learning
    assert all(module[3]._buffers[name] is buffer for name, buffer in buffers.items())
    assert not module[3].update_keys
    x = torch.randn(50, 2, 3)
    exact = (x[..., None, :] - module[3].keys).square().sum(-1)
    exact[:, ~module[3].pair_mask] = torch.inf
    assert torch.equal(module[3].encode(x), exact.argmin(-1))
