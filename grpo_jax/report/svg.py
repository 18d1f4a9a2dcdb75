"""Figures as inline SVG, in one style, and their colours."""

import functools
import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

COLOURS = ("#2f5d8a", "#c0562f", "#4d8a4a", "#7b569c", "#8a7a2f", "#3f8f8f")
BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]
SAND, GREY, BLACK, PALE = "#b9a44c", "#999999", "#222222", "#dddddd"
LEAST_DOTS = 5  # of a scatter: fewer show no relation, in whatever order


class Figure(TypedDict):
    title: str
    caption: str
    svg: str


class TooFew(NamedTuple):
    """In place of a figure: of what there are too few, and how many it needs."""

    title: str
    count: int
    what: str  # in the plural
    least: int

    def text(self) -> str:
        """A clause of a sentence."""
        return f"{self.title} (needs {self.least} {self.what}, has {self.count})"


def too_few_measurements(title: str, count: int) -> TooFew | None:
    """Of a figure over the run: a single measurement would be a dot."""
    return TooFew(title, count, "measurements", 2) if count < 2 else None


def svg_figure(
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    rows: int = 1,
    columns: int = 1,
    height: float = 3.0,
) -> Figure:
    """Draws a figure.

    Args:
        title, caption: Printed beside the figure, not in it.
        draw: Takes the matplotlib axes, or the list of them where there are several
            rows or columns, which share their scales.
        rows, columns: Of axes.
        height: Of the figure in inches; it is 4.6 wide.
    """
    plt = _pyplot()
    style: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "svg.hashsalt": "grpo_jax",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(4.6, height),
            layout="constrained",
            sharex=True,
            sharey="row",
            squeeze=False,
        )
        panels = list(axes.flat)
        draw(panels if len(panels) > 1 else panels[0])
        for panel in panels:
            if panel.get_legend_handles_labels()[0] and panel.get_legend() is None:
                # Named: by default a busy machine warns that "best" took long.
                panel.legend(frameon=False, fontsize=7.5, loc="best")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return Figure(title=title, caption=caption, svg=svg[svg.index("<svg") :])


@functools.cache
def _pyplot() -> Any:
    """matplotlib.pyplot; it takes a temporary directory in silence where HOME, or what
    MPLCONFIGDIR names, cannot be written."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    finally:
        logger.setLevel(before)
    return plt
