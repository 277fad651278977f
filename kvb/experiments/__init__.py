"""Protocols that train heads on fixed features and measure what they keep.

``class_incremental`` trains ``heads`` in three scenarios; ``protocol`` is the paper's, over seeds, on any features;
``demo`` is short. On ``digits``, ``mnist`` (with the encoder ``lite0``) or ``newsgroups`` (with ``minilm``). These,
``demo``, ``report`` and ``plots`` need the packages of ``kvb[demo]``; this module does not.
"""

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
from kvb.experiments.heads import BottleneckHead, Budget, Head, NearestMeanHead, NetworkHead

__all__ = [
    "SCENARIOS",
    "BottleneckHead",
    "Budget",
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
