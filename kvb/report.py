"""A page about a bottleneck in a file: sizes, usage, pictures. One HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvb import checkpoints, files, plots, unlearning
from kvb.about import __version__
from kvb.data import CodeDataset
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.hub import WEIGHTS

_MOST_CLASSES = 100  # whose overlap is drawn
_Path = str | os.PathLike[str]
# The pictures, and what to see in them.
USAGE, LORENZ = "How often pairs are fetched", "How evenly pairs are fetched"
KEYS, VALUES, SHARED, ACCURACIES = (
    "Where keys lie",
    "What values say",
    "What classes share",
    "What tasks cost each other",
)
_TO_SEE = {
    USAGE: "Pairs at 1 get an equal share of their codebook's hits; those at 0 are dead.",
    LORENZ: "The nearer to the straight line, the more even. A thin line is a codebook, the thick one their mean.",
    KEYS: "The keys of a codebook on the plane of their largest spread. Crosses are keys that nothing fetched.",
    VALUES: "A row is the value of a pair, and its largest entry the class that it votes for, named on the left.",
    SHARED: "Of what two classes fetch, the share that is the same: what forgetting one may cost the other.",
    ACCURACIES: "From left to right the tasks, from top to bottom what was learned so far.",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto; padding: 0 1.5rem; }}
h1 {{ margin-bottom: .5rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; margin-bottom: 2rem; }}
td {{ border-bottom: 1px solid #ddd; padding: .25rem 1.5rem .25rem 0; vertical-align: top; }}
td:first-child {{ color: #666; white-space: nowrap; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 2rem; }}
figure {{ margin: 0; }}
figcaption {{ margin-bottom: .5rem; color: #666; font-size: .875rem; min-height: 4.2rem; }}
figcaption b {{ display: block; color: #222; font-size: 1rem; }}
img {{ width: 100%; height: auto; }}
footer {{ color: #666; margin-top: 2rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}
</table>
<div class="pictures">
{pictures}
</div>
<footer>kvb {version}</footer>
</body>
</html>
"""


def write(source: _Path, out: _Path, data: _Path | None = None, accuracies: _Path | None = None) -> Path:
    """Write the page of the bottleneck in a file, or in a folder of ``save_pretrained``.

    Args:
        source: a file of ``kvb.save``, or any state_dict with one bottleneck in it; or a folder.
        out: the page, ``report.html`` say; replaced as a whole.
        data: a ``.npy`` of ``encode_dataset``: its codes are counted, in place of the hits in the file, and where it
            has labels, what classes share is drawn.
        accuracies: a JSON list of rows [T, T], null where nothing was measured, for ``kvb.plots.accuracies``.
    Returns:
        ``out``.
    Raises:
        CheckpointError: the file is damaged or no checkpoint. ValueError: no bottleneck in it, several, codes of
        another one, or accuracies that are no such list. OSError: a file cannot be read or written.
    Examples:
        >>> kvb.save(kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10), "memory.pt")
        >>> kvb.report.write("memory.pt", "report.html").name
        'report.html'
    """
    path = Path(source)
    path = path / WEIGHTS if path.is_dir() else path
    bottleneck = bottleneck_of(checkpoints.read_state(path), path)
    facts, per_class = dict(bottleneck._facts()), None
    if data is not None:
        codes = CodeDataset.open(data)
        hits = unlearning.hits(bottleneck, codes)
        bottleneck.freeze_keys().cluster_size_counter.copy_(hits)
        facts = {**bottleneck._facts(), "samples": f"{len(codes)}, of {Path(data).name}"}
        per_class = None if codes.labels is None else unlearning.class_hits(bottleneck, codes)
    pictures = {}
    if bool(bottleneck.usage().any()):
        pictures = {USAGE: _drawn(plots.usage, bottleneck), LORENZ: _drawn(plots.lorenz, bottleneck)}
        pictures[KEYS] = _drawn(plots.key_map, bottleneck)
    pictures[VALUES] = _drawn(plots.values, bottleneck)
    if per_class is not None and 1 < len(per_class) <= _MOST_CLASSES:
        pictures[SHARED] = _drawn(plots.overlap, unlearning.overlap(per_class))
    if accuracies is not None:
        pictures[ACCURACIES] = _drawn(plots.accuracies, _rows(accuracies))
    with files.replacing(out) as file:
        file.write(_page(path.name if path.name != WEIGHTS else path.parent.name, facts, pictures).encode())
    return Path(out)


def _rows(path: _Path) -> Tensor:
    """The numbers in a file of accuracies."""
    try:
        rows = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"expected a JSON list of rows of numbers in {path}: {error}") from error
    lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not lists or not all(isinstance(number, int | float | None) for row in rows for number in row):
        raise ValueError(f"expected a JSON list of rows of numbers in {path}, null where nothing was measured")
    return torch.tensor([[torch.nan if number is None else number for number in row] for row in rows])


def bottleneck_of(state: Mapping[str, Tensor], source: Any) -> KeyValueBottleneck:
    """The one bottleneck in a state_dict, whatever is around it.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), kvb.KeyValueBottleneck(4, 16, 8, 10))
        >>> kvb.report.bottleneck_of(model.state_dict(), "model").values.shape
        torch.Size([4, 16, 10])
    """
    needed = {"keys", "values", "cluster_size"}
    prefixes = [name.removesuffix("keys_avg") for name in state if name.rpartition(".")[2] == "keys_avg"]
    found = [prefix for prefix in prefixes if all(prefix + name in state for name in needed)]
    if len(found) != 1:
        raise ValueError(f"expected one bottleneck in {source}, found {len(found)}: {', '.join(found)[:200]}")
    own = {name.removeprefix(found[0]): value for name, value in state.items() if name.startswith(found[0])}
    C, K, D = own["keys"].shape
    with torch.device("meta"):  # the file's tensors become the module's
        bottleneck = KeyValueBottleneck(C, K, D, own["values"].shape[-1])
    known = bottleneck.state_dict().keys()
    bottleneck.load_state_dict({name: value for name, value in own.items() if name in known}, assign=True)
    return bottleneck.eval()


def _drawn(draw: Callable[..., Any], what: Any) -> bytes:
    picture = io.BytesIO()
    draw(what).figure.savefig(picture, format="png", dpi=160)
    return picture.getvalue()


def _page(title: str, facts: Mapping[str, str], pictures: Mapping[str, bytes]) -> str:
    rows = "\n".join(
        f"<tr><td>{html.escape(fact)}</td><td>{html.escape(text)}</td></tr>" for fact, text in facts.items()
    )
    shown = "\n".join(
        f"<figure><figcaption><b>{html.escape(caption)}</b>{html.escape(_TO_SEE[caption])}</figcaption>"
        f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></figure>'
        for caption, picture in pictures.items()
    )
    return _PAGE.format(title=html.escape(title), rows=rows, pictures=shown, version=__version__)
