"""What the helpers and the callback write, read back by TensorBoard itself."""

import pytest
import torch

import kvb

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of TensorBoard's own imports
pytest.importorskip("tensorboard", reason="pip install 'kvb[integrations]'")
pytest.importorskip("matplotlib", reason="pip install 'kvb[integrations]'")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from kvb.integrations import tensorboard as kvb_tensorboard  # noqa: E402

PICTURES = ["usage", "lorenz", "key_map", "values"]


def read(folder):
    return EventAccumulator(str(folder), {"images": 0, "scalars": 0, "histograms": 0}).Reload()


def counted():
    module = kvb.KeyValueBottleneck(2, 8, 3, 4).freeze_keys().train()
    module(torch.randn(5, 2, 3))
    return module


def test_numbers_and_a_histogram(tmp_path):
    module = counted()
    with SummaryWriter(tmp_path) as writer:
        kvb_tensorboard.log_usage(writer, module, 7, tag="memory")
    found, usage = read(tmp_path), module.usage()
    scalars = {name: found.Scalars(f"memory/{name}")[0] for name in ("perplexity", "unused_pairs", "dead_codes")}
    assert {event.step for event in scalars.values()} == {7}
    assert scalars["perplexity"].value == pytest.approx(float(module.perplexity().mean()))
    assert scalars["unused_pairs"].value == pytest.approx(float((usage == 0).float().mean()))
    assert scalars["dead_codes"].value == int((usage == 0).sum()) > 0
    histogram = found.Histograms("memory/usage")[0].histogram_value
    assert (histogram.num, histogram.max) == (16, pytest.approx(float(usage.max() * 8)))
    assert histogram.sum == pytest.approx(16)


def test_pictures(tmp_path):
    module = counted()
    with SummaryWriter(tmp_path) as writer:
        kvb_tensorboard.log_pictures(
            writer, kvb.BottleneckedEncoder(torch.nn.Linear(6, 6), 6, 2, 8, 3, 4), 1, tag="new"
        )
        kvb_tensorboard.log_pictures(writer, module, 7)
    found = read(tmp_path)
    assert set(found.Tags()["images"]) == {"new/values", "new/usage", "new/lorenz", "new/key_map"} | {
        f"bottleneck/{name}" for name in PICTURES
    }
    for name in PICTURES:
        picture = found.Images(f"bottleneck/{name}")[0]
        assert picture.step == 7
        assert picture.width > 100
        assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_pictures_before_anything_was_counted(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        kvb_tensorboard.log_pictures(writer, kvb.KeyValueBottleneck(2, 8, 3, 4).freeze_keys())
    assert read(tmp_path).Tags()["images"] == ["bottleneck/values"]


@pytest.mark.parametrize("log", [kvb_tensorboard.log_usage, kvb_tensorboard.log_pictures])
def test_what_is_no_writer(log):
    with pytest.raises(
        TypeError, match="writer must be a torch.utils.tensorboard.SummaryWriter, got dict without add_"
    ):
        log({}, counted())


def test_the_callback_of_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="pip install 'kvb[integrations]'")
    import lightning.pytorch as lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    from kvb.integrations.lightning import InitKeys, LogUsage

    class Learner(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.memory = kvb.BottleneckedEncoder(torch.nn.Linear(6, 12), 12, 3, 8, 4, 5, init_mode="kmeans")

        def training_step(self, batch, number):
            return torch.nn.functional.cross_entropy(self.memory(batch[0], pool="mean"), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([self.memory.values], lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randint(5, (64,)))
    init = InitKeys(progress=False)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    model = Learner()
    lightning.Trainer(
        max_epochs=4, callbacks=[init, LogUsage(pictures=2)], accelerator="cpu", logger=logger, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, torch.utils.data.DataLoader(data, batch_size=16))  # fmt: skip
    logger.experiment.flush()
    found = read(tmp_path / "run")
    for name in PICTURES:
        assert [event.step for event in found.Images(f"memory/{name}")] == [8, 16]
    assert len(found.Scalars("memory/perplexity")) == 4
    assert found.Scalars("memory/dead_codes")[-1].value == int((model.memory.usage() == 0).sum())
    assert found.Scalars("memory/inertia")[-1].value == pytest.approx(init.reports["memory"].inertia)
