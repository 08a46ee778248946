"""A problem, its right solution, and limits that end a bad one soon."""

from phiforge.verify.sandbox import Limits
from phiforge.verify.tests import FunctionTest

SQUARE = FunctionTest(
    """
def check(candidate):
    import math
    assert candidate(3) == 9
    assert abs(candidate(2) - 4) < 1e-6
    assert math.isclose(candidate(1.5), 2.25)
    assert all(candidate(x) >= 0 for x in range(3))
    assert len([candidate(5)]) == 1 and candidate(5) in (25,)
    assert candidate(4) != 15
""",
    entry_point="square",
    name="square",
)
RIGHT = "def square(x):\n    return x * x\n"
QUICK = Limits(cpu_seconds=1, wall_seconds=2.5, memory_bytes=256 * 2**20)
