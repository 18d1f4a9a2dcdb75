"""Figures as inline SVG, in one style; what the report's files draw with."""

import io
from collections.abc import Callable
from typing import Any

COLOURS = ("#2f5d8a", "#c0562f", "#4d8a4a", "#7b569c", "#8a7a2f", "#3f8f8f")
GREY = "#999999"


def svg_figure(
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    rows: int = 1,
    columns: int = 1,
    height: float = 3.0,
) -> dict[str, str]:
    """Runs draw(axes) and returns {title, caption, svg}.

    Several rows or columns share their axes, and draw is given the list of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
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
                panel.legend(frameon=False, fontsize=7.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return {"title": title, "caption": caption, "svg": svg[svg.index("<svg") :]}
