"""A line of the size of a word: how a value between 0 and 1 went, with marks where it jumped.

Call `sparkline([0.4, 0.4, 0.9], marks=[2], label="p over the answer")`. Writes nothing.
"""

from collections.abc import Collection, Sequence

from phiforge.core.page.markup import Html, element

MAX_POINTS = 240
_WIDTH, _HEIGHT, _MARGIN = 220, 40, 4


def sparkline(values: Sequence[float | None], *, marks: Collection[int] = (), label: str) -> Html:
    """An SVG of `values` (None: unknown, passed over); `marks` are indices that get a dot.

    More than MAX_POINTS values are thinned, marked ones and those before them always kept.
    """
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    if len(known) < 2:
        return Html("")
    last = len(values) - 1
    stride = -(-len(known) // MAX_POINTS)
    wanted = {i for mark in marks for i in (mark - 1, mark)} | {known[-1][0]}
    kept = [(i, v) for n, (i, v) in enumerate(known) if n % stride == 0 or i in wanted]
    points = {i: (_x(i, last), _y(v)) for i, v in kept}
    dots = [
        element("circle", cx=points[i][0], cy=points[i][1], r=3, class_=_style(values, i))
        for i in sorted(marks)
        if i in points
    ]
    line = " ".join(f"{x},{y}" for x, y in points.values())
    middle = _y(0.5)
    return element(
        "svg",
        element("line", x1=_MARGIN, x2=_WIDTH - _MARGIN, y1=middle, y2=middle, class_="middle"),
        element("polyline", points=line),
        *dots,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=_WIDTH,
        height=_HEIGHT,
        class_="sparkline",
        role="img",
        aria_label=label,
    )


def _style(values: Sequence[float | None], index: int) -> str:
    before = next((v for v in reversed(values[:index]) if v is not None), None)
    now = values[index]
    return "fall" if before is not None and now is not None and now < before else "rise"


def _x(index: int, last: int) -> str:
    return f"{_MARGIN + index / max(1, last) * (_WIDTH - 2 * _MARGIN):.1f}"


def _y(value: float) -> str:
    height = _HEIGHT - 2 * _MARGIN
    return f"{_MARGIN + (1 - min(1.0, max(0.0, value))) * height:.1f}"
