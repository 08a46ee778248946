"""Whether two short LaTeX expressions are equal, by math-verify, under limits that count work.

`equal(gold, given)` in this process, or `python -m phiforge.verify.equivalence`: one JSON line
{"gold": ..., "given": ...} in, {"equal": true | false | null, "why": ...} out. Writes nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 400  # the longest of 12,507 final answers of MATH has 159
MAX_DEPTH = 8  # of brackets (MATH: 2); the parser takes seconds for 10
MAX_BITS = 50_000  # of a number that is evaluated
MAX_POWER = 64  # of a sum with variables
MAX_FACTORIAL = 5000
# Calls of Python functions in one comparison, counted so that the verdict does not depend on the
# machine's speed. Comparisons of final answers of MATH take 630,000 at most.
MAX_CALLS = 2_000_000


class TooMuchWork(BaseException):
    """Not an Exception, so that the library's own handlers let it through."""


def equal(gold: str, given: str) -> bool | None:
    """Whether `given` equals `gold`; None when that takes too much work to find out.

    What is no expression, too long, or too large to evaluate (9^{9^9}) equals nothing.
    """
    from math_verify import verify

    def compare() -> bool:
        wanted, found = _parsed(gold), _parsed(given)
        if wanted is None or found is None or _too_large(wanted) or _too_large(found):
            return False
        return verify(
            wanted,
            found,
            timeout_seconds=None,
            allow_set_relation_comp=True,  # x <= 3 answers (-oo, 3]
        )

    return _counted(compare)


def is_expression(text: str) -> bool:
    """Whether a text can be read as mathematics at all."""
    return bool(_counted(lambda: _parsed(text) is not None))


def _counted(work: Callable[[], bool]) -> bool | None:
    """The result of `work`, None after MAX_CALLS calls; the same whatever was computed before."""
    from sympy.core.cache import clear_cache
    from sympy.core.random import seed

    clear_cache()
    seed(0)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"
        if calls > MAX_CALLS:
            raise TooMuchWork

    sys.setprofile(count)
    try:
        return bool(work())
    except (TooMuchWork, MemoryError):
        return None
    finally:
        sys.setprofile(None)


def _parsed(text: str) -> Any:
    """The expression in a text; None when there is none."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if len(text) > MAX_CHARACTERS or _depth(text) > MAX_DEPTH:
        return None
    # Without the dollars a third of LaTeX answers is not found (a measured trap).
    looks = NormalizationConfig(
        basic_latex=True,
        units=False,  # it would take 5t for five tons, equal to 5
        malformed_operators=True,
        nits=True,
        boxed="none",
        equations=False,
    )
    found = parse(
        f"${text}$",
        [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=looks)],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    return found[0] if found else None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _too_large(expression: Any) -> bool:
    """Whether evaluating an expression could take more than a moment."""
    import sympy

    unevaluated = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, unevaluated) or _bits(node) > MAX_BITS:
            return True
        if isinstance(node, sympy.Pow) and node.base.is_Add and node.base.free_symbols:
            expands = node.exp.is_Integer and abs(int(node.exp)) > MAX_POWER
            if expands:
                return True
    return False


def _bits(node: Any) -> float:
    """A bound on log2 of the size of a number's parts; symbols count as 1, the rest as small."""
    import sympy

    if isinstance(node, sympy.Integer | sympy.Rational):
        return float(max(abs(int(node.p)), int(node.q)).bit_length())
    if isinstance(node, sympy.Float):
        return abs(float(sympy.log(abs(node), 2))) + 1 if node else 1.0
    below = [_bits(child) for child in getattr(node, "args", ()) if isinstance(child, sympy.Basic)]
    if isinstance(node, sympy.exp | sympy.Pow):
        base = 1.5 if isinstance(node, sympy.exp) else max(1.0, _bits(node.base))
        return base * _two_to(_bits(node.exp))
    if isinstance(node, sympy.factorial | sympy.binomial | sympy.gamma):
        largest = _two_to(max(below, default=0.0))
        return math.inf if largest > 2 * MAX_FACTORIAL else largest * math.log2(largest + 2)
    return sum(below) if below else 1.0


def _two_to(bits: float) -> float:
    return 2.0**bits if bits < 1000 else math.inf


def main() -> None:
    """Answer lines until the input ends."""
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    logging.disable(logging.CRITICAL)  # it warns once that its own time limit is off
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["given"] is None:
            verdict: bool | None = is_expression(asked["gold"])
        else:
            verdict = equal(asked["gold"], asked["given"])
        print(json.dumps({"equal": verdict}), flush=True)


if __name__ == "__main__":
    main()
