"""Protocols that train heads on fixed features and measure what they keep.

``class_incremental`` trains ``heads`` in three scenarios; ``protocol`` is the paper's, over seeds, on any features;
``report`` is its command, and ``full`` one run of all its steps; ``demo`` is short; ``toy`` is the paper's figure 2;
``unlearning`` forgets classes. ``studies`` says what they are about; ``data`` holds the studies, ``encoders`` the
pretrained networks behind them. Commands, figures and data need the packages of ``kvb[demo]``; this module does not.
"""

from kvb.experiments.baselines import NearestMeanHead
from kvb.experiments.class_incremental import (
    SCENARIOS,
    Examples,
    Plateau,
    Result,
    Score,
    choose_rate,
    draw_tasks,
    learn,
    stratified_split,
)
from kvb.experiments.heads import BottleneckHead, Budget, CodesHead, Head, NetworkHead

__all__ = [
    "SCENARIOS",
    "BottleneckHead",
    "Budget",
    "CodesHead",
    "Examples",
    "Head",
    "NearestMeanHead",
    "NetworkHead",
    "Plateau",
    "Result",
    "Score",
    "choose_rate",
    "draw_tasks",
    "learn",
    "stratified_split",
]
