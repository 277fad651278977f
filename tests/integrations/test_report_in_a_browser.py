"""The page of ``kvb report`` in Chromium without a window: what it shows, what it says, and whom it asks."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import kvb

pytestmark = pytest.mark.integrations
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt install chromium", allow_module_level=True)

PICTURES = [
    "How often pairs are fetched",
    "How evenly pairs are fetched",
    "Where keys lie",
    "What values say",
    "What classes share",
    "What tasks cost each other",
]
# Each picture as the browser decoded it, what the page loaded from elsewhere, and whether it is wider than the window.
ASK = """<script>addEventListener("load", () => { document.body.dataset.seen = JSON.stringify({
  pictures: [...document.images].map(one => [one.alt, one.complete && one.naturalWidth > 300 && one.width > 200]),
  loaded: performance.getEntriesByType("resource").map(one => one.name),
  wide: document.documentElement.scrollWidth > innerWidth }) })</script>"""


def browse(page, folder, *options):
    """What Chromium writes, and its log; it finds no host."""
    quiet = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *(
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ),
    )
    command = [CHROMIUM, *quiet, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def ask(page, folder, *options, more=""):
    """What the page says of itself, the rest of it, and Chromium's log."""
    asking = folder / "asking.html"
    asking.write_text(page.read_text().replace("</body>", more + ASK + "</body>"))
    shown, log = browse(asking, folder, "--virtual-time-budget=5000", "--dump-dom", *options)
    seen = re.search(r'data-seen="([^"]*)"', shown)[1].replace("&quot;", '"')
    return json.loads(seen), shown, log


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a bottleneck that learned three classes, by the command line."""
    folder = tmp_path_factory.mktemp("report")
    x, y = torch.randn(90, 6), torch.arange(90) % 3
    x[:, 0] += 4 * y
    model = kvb.BottleneckedEncoder(torch.nn.Linear(6, 12), 12, 4, 16, 4, 3, init_values="zeros", init_mode="kmeans")
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=30)
    model.prepare(batches)
    data = model.encode_dataset(batches, out=folder / "codes.npy", progress=False)
    for codes, targets in data.batches(30):
        kvb.training.sgd_step(model.values, codes, targets)
    kvb.save(model, folder / "model.safetensors")
    (folder / "accuracies.json").write_text("[[0.9, null], [0.8, 0.95]]")
    command = "report model.safetensors --data codes.npy --accuracies accuracies.json"
    subprocess.run([sys.executable, "-m", "kvb", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder / "report.html"


@pytest.mark.parametrize("window", ["1280,900", "500,900"])
def test_all_pictures_are_shown_and_nothing_is_asked_for(page, tmp_path, window):
    seen, shown, log = ask(page, tmp_path, f"--window-size={window}")
    assert seen == {"pictures": [[caption, True] for caption in PICTURES], "loaded": [], "wide": False}
    assert "4 codebooks of 16 pairs, keys of 4 and values of 3 numbers" in shown
    assert "CONSOLE" not in log


def test_a_page_with_faults_would_be_seen(page, tmp_path):
    """What the test above relies on."""
    faults = '<img src="http://localhost:9/x.png"><script>f()</script><p style="width:3000px">wide</p>'
    seen, _, log = ask(page, tmp_path, more=faults)
    assert seen["pictures"][-1] == ["", False]
    assert seen["loaded"] == ["http://localhost:9/x.png"]
    assert seen["wide"]
    assert "CONSOLE" in log


def test_a_screenshot_is_not_blank(page, tmp_path):
    from matplotlib import image

    browse(page, tmp_path, "--window-size=1280,1200", f"--screenshot={tmp_path / 'page.png'}")
    pixels = image.imread(tmp_path / "page.png")
    assert pixels.shape[:2] == (1200, 1280)
    assert 0.02 < (pixels[..., :3] < 0.95).any(-1).mean() < 0.7, "ink on white paper"
