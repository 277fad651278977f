"""The callbacks in real training runs of Lightning."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kvb

pytestmark = pytest.mark.integrations
lightning = pytest.importorskip("lightning.pytorch", reason="pip install 'kvb[integrations]'")
callbacks = pytest.importorskip("kvb.integrations.lightning")


class Learner(lightning.LightningModule):
    def __init__(self, init_mode="kmeans"):
        super().__init__()
        self.memory = kvb.BottleneckedEncoder(torch.nn.Linear(6, 12), 12, 3, 8, 4, 5, init_mode=init_mode)
        self.seen = []

    def training_step(self, batch, number):
        x, y = batch
        self.seen.append((self.memory.keys_frozen, self.memory.keys.clone()))
        return F.cross_entropy(self.memory(x, pool="mean"), y)

    def configure_optimizers(self):
        return torch.optim.SGD([self.memory.values], lr=0.1)


def fit(model, *chosen, epochs=2):
    data = TensorDataset(torch.randn(64, 6), torch.randint(5, (64,)))
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(chosen), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=16))
    return trainer


def test_keys_are_there_before_the_first_step():
    model, init = Learner(), callbacks.InitKeys(progress=False)
    fit(model, init)
    assert all(frozen for frozen, _ in model.seen)
    assert torch.equal(model.seen[0][1], model.memory.keys)
    assert init.reports["memory"].inertia > 0


def test_keys_that_are_there_stay_unless_a_method_is_named():
    model = Learner("random")
    keys = model.memory.keys.clone()
    fit(model, callbacks.InitKeys(progress=False, freeze=False), callbacks.FreezeKeys(0))
    assert torch.equal(model.memory.keys, keys)
    fit(model := Learner("random"), init := callbacks.InitKeys("sample", epochs=0, progress=False, submodule="memory"))
    assert init.reports.keys() == {"memory"}
    assert model.memory.keys_frozen


def test_keys_learn_until_they_are_frozen():
    model = Learner()
    fit(model, callbacks.InitKeys(freeze=False, progress=False), callbacks.FreezeKeys(2), epochs=4)
    frozen = [one for one, _ in model.seen]
    assert frozen == [False] * 8 + [True] * 8
    assert not torch.equal(model.seen[0][1], model.seen[7][1])
    assert torch.equal(model.seen[8][1], model.seen[15][1])


def test_usage_is_logged():
    model = Learner()
    trainer = fit(model, callbacks.InitKeys(progress=False), callbacks.LogUsage())
    logged = trainer.logged_metrics
    torch.testing.assert_close(logged["memory/perplexity"], model.memory.perplexity().mean())
    torch.testing.assert_close(logged["memory/unused_pairs"], model.memory.fraction_of_unused_keys())


def test_what_is_no_bottleneck():
    with pytest.raises(ValueError, match="Linear holds no bottleneck of kvb"):
        callbacks.bottlenecks(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected submodule='memory.encoder' to be a bottleneck of kvb, got Linear"):
        callbacks.bottlenecks(Learner(), "memory.encoder")
    assert callbacks.bottlenecks(kvb.KeyValueBottleneck(2, 4, 3, 5)).keys() == {"bottleneck"}
