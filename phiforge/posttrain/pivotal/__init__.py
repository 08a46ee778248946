"""Pivotal-token search (PTS, arXiv 2412.08905 §4.3): the single tokens that decide an answer.

Call `search(engine, problems, oracle)` and iterate over the PivotalTokens it finds, or over
`.questions()` for paths, pairs and rollouts too. Needs no torch; the stage is in `stage.py`.
"""

from phiforge.posttrain.pivotal.estimates import Estimate, Ledger, Rollout, difference_interval
from phiforge.posttrain.pivotal.results import (
    METHODS,
    PivotalToken,
    QuestionResult,
    SearchedPath,
    Settings,
)
from phiforge.posttrain.pivotal.rollouts import RolloutLog
from phiforge.posttrain.pivotal.search import Search, search
from phiforge.posttrain.pivotal.subdivide import midpoint, subdivide

__all__ = [
    "METHODS",
    "Estimate",
    "Ledger",
    "PivotalToken",
    "QuestionResult",
    "Rollout",
    "RolloutLog",
    "Search",
    "SearchedPath",
    "Settings",
    "difference_interval",
    "midpoint",
    "search",
    "subdivide",
]
