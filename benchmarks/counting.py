"""The heads on several nearest pairs, in seconds: ``python -m benchmarks.counting``, from the repository root.

50,000 samples whose 8 nearest pairs are known in each of 256 codebooks of 2,048. The peer is the bar itself, so that
the ratio is the bar over the time; a figure for two idle cores. As in ``benchmarks.bars``, the exit status is 1 where a
row falls short. ``quick`` takes a tenth of the samples, and of the bar.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import table, verify
from benchmarks.table import Measured, Row, effort
from benchmarks.timing import Ratio, timed
from kvb import training
from kvb.counting import ClassCounts

SAMPLES, C, K, T, V = 50_000, 256, 2048, 8, 10
BATCH, EPOCHS = 256, 20
COUNTING_BAR, EPOCHS_BAR = 1.5, 20.0  # seconds: one pass; 20 epochs
BAR = "the bar"


def _samples(number: int) -> tuple[Tensor, Tensor]:
    """Codes [N, C, T] int16, few of them fetched by many samples as real ones are, and labels."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.empty(number, C, T, dtype=torch.int16)
    for part in codes.split(4096):
        part.copy_(torch.rand(part.shape, generator=generator).square_().mul_(K))
    return codes, torch.randint(V, (number,), generator=generator)


def _against(seconds: Sequence[float], bar: float) -> Measured:
    """The bar over the median, and over the slowest and the quickest."""
    low, middle, high = (sorted(seconds)[place] for place in (0, len(seconds) // 2, -1))
    return Measured(middle, bar, "s", BAR, Ratio(bar / middle, bar / high, bar / low))


def _number(quick: bool) -> int:
    return SAMPLES // 10 if quick else SAMPLES


def counting(quick: bool) -> Measured:
    """Class counts of all samples, in one pass.

    Raises:
        WrongResult: counts other than those of the first samples, one by one.
    """
    codes, labels = _samples(_number(quick))
    heads = [ClassCounts(C, K, V) for _ in range(effort(quick).rounds)]
    seconds = [timed(lambda head=head: head.add(codes, labels))[0] for head in heads]  # type: ignore[misc]
    few, wanted = ClassCounts(C, K, V).add(codes[:64], labels[:64]), torch.zeros(C, K, V, dtype=torch.int32)
    books, ones = torch.arange(C)[:, None].expand(C, T), torch.ones(C, T, dtype=torch.int32)
    for code, label in zip(codes[:64].long(), labels, strict=False):
        wanted[..., label].index_put_((books, code), ones, accumulate=True)
    verify.equal(few.counts, wanted, "counts")
    return _against(seconds, COUNTING_BAR * len(labels) / SAMPLES)


def epochs(quick: bool) -> Measured:
    """Twenty epochs of SGD on the same codes, each taken to last as long as the median of those that are run."""
    codes, labels = _samples(_number(quick))
    values = torch.zeros(C, K, V)
    batches = list(zip(codes.split(BATCH), labels.split(BATCH), strict=True))
    epoch = partial(timed, lambda: [training.sgd_step(values, *batch) for batch in batches])
    seconds = [EPOCHS * epoch()[0] for _ in range(effort(quick).rounds)]
    return _against(seconds, EPOCHS_BAR * len(labels) / SAMPLES)


MEASURES: dict[str, Callable[[bool], Measured]] = {"counting": counting, "epochs": epochs}
ROWS = tuple(Row(name, measure, 1.0) for name, measure in MEASURES.items())


def main(arguments: Sequence[str] | None = None) -> int:
    return table.run(ROWS, "benchmarks.counting", __doc__ or "", arguments, held=True)


if __name__ == "__main__":
    sys.exit(main())
