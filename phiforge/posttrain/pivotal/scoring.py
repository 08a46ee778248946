"""What oracles are made of: a function of many (problem, response) pairs that never raises.

`Scorer(each(check), close)` from a function of one pair; see `oracles.py`. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phiforge.core.records import Problem
from phiforge.verify.answers import OracleError

Pair = tuple[Problem, str]
Verdict = bool | OracleError
Check = Callable[[Problem, str], bool]


def _nothing() -> None:
    pass


def takes_any(problem: Problem) -> str | None:
    """For oracles that need nothing of a problem."""
    return None


def needs_answer(problem: Problem) -> str | None:
    """For oracles that compare with a reference."""
    return None if problem.answer else "it has no reference answer"


@dataclass(frozen=True)
class Scorer:
    """many: the verdicts of pairs, with an OracleError in the place of one that cannot be told.
    close: ends what it holds. refuses: why no response to a problem could ever be scored, or None.
    """

    many: Callable[[Sequence[Pair]], list[Verdict]]
    close: Callable[[], object] = _nothing
    refuses: Callable[[Problem], str | None] = takes_any


def each(check: Check, workers: int = 1) -> Callable[[Sequence[Pair]], list[Verdict]]:
    """`many` of a function of one pair, in so many threads; what raises leaves its pair unscored.

    KeyboardInterrupt and the like go through.
    """

    def one(pair: Pair) -> Verdict:
        try:
            return check(*pair)
        except OracleError as error:
            return error
        except Exception as error:
            return OracleError(f"problem {pair[0].id}: {type(error).__name__}: {error}")

    def many(pairs: Sequence[Pair]) -> list[Verdict]:
        from concurrent.futures import ThreadPoolExecutor

        if workers == 1 or len(pairs) < 2:
            return [one(pair) for pair in pairs]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, pairs))

    return many
