"""Protocols that train heads on fixed features and measure what they keep: ``class_incremental``; ``demo`` runs it.

On ``digits``, ``mnist`` (with the encoder ``lite0``) or ``newsgroups`` (with ``minilm``). ``unlearning`` forgets
classes of the same; ``toy`` is the paper's figure 2. ``demo``, these and ``plots`` need the packages of ``kvb[demo]``;
this module does not.
"""

from kvb.experiments.class_incremental import (
    BottleneckHead,
    Budget,
    Examples,
    Head,
    NetworkHead,
    Result,
    Score,
    choose_rate,
    draw_tasks,
    learn,
    stratified_split,
)

__all__ = [
    "BottleneckHead",
    "Budget",
    "Examples",
    "Head",
    "NetworkHead",
    "Result",
    "Score",
    "choose_rate",
    "draw_tasks",
    "learn",
    "stratified_split",
]
