"""Figures of updates: predicted and realised changes, effects of prompt weights."""

from typing import Any

import numpy as np

from grpo_jax.instrument.rows import (
    THIRDS,
    Row,
    finite_mean,
    first_order,
    has_pass_rates,
    pass_rates,
    values,
    with_update,
)
from grpo_jax.intervals import t_interval
from grpo_jax.report.svg import (
    BLACK,
    BLUE,
    COLOURS,
    LEAST_DOTS,
    ORANGE,
    Figure,
    TooFew,
    svg_figure,
)

Rows = list[Row]
LEAST_AVERAGED = 4  # prompts with signal, over all measurements, that a bar averages


def predictions(rows: Rows) -> Figure | TooFew | None:
    """Change of each prompt by the next update: predicted against realised."""
    title = "Predicted and realised change"
    rows = with_update(rows)
    if not rows:
        return None
    points = _predicted_and_realised(rows)
    most = max((xy.shape[1] for xy in points.values()), default=0)
    if most < LEAST_DOTS:
        return TooFew(title, most, "changes of a prompt", LEAST_DOTS)
    points = {k: xy for k, xy in points.items() if xy.shape[1] >= LEAST_DOTS}

    def draw(axes: Any) -> None:
        for (name, (x, y)), colour in zip(points.items(), (BLUE, ORANGE), strict=False):
            axes.scatter(x, y, s=9, color=colour, alpha=0.6, lw=0, label=name)
        ends = [f(y for xy in points.values() for y in xy[1]) for f in (min, max)]
        if ends[0] < ends[1]:
            axes.plot(ends, ends, color=BLACK, lw=1)
        axes.set(xlabel="predicted change", ylabel="realised change")

    correlations = {name: _correlation(*xy) for name, xy in points.items()}
    texts = [
        f"{value:.2f} ({name}, {points[name].shape[1]} changes)"
        for name, value in correlations.items()
        if np.isfinite(value)
    ]
    caption = (
        "Change of each probe prompt's "
        f"{'expected' if rows[0]['pass_rate'] is not None else 'sampled mean'} reward "
        "by the update after each measurement, against slope + curvature / 2 along it"
    )
    caption += f"; correlation {', '.join(texts)}." if texts else "."
    return svg_figure(title, caption, draw)


def _predicted_and_realised(rows: Rows) -> dict[str, np.ndarray]:
    """name -> [2, N] finite pairs (predicted, realised), by what predicts them."""
    realised = values(rows, "update", "realised").ravel()
    half_curvature = values(rows, "update", "exact_curvature") / 2
    predicted = {
        "sampled": values(rows, "update", "predicted"),
        "exact slope and curvature": values(rows, "update", "exact_slope")
        + half_curvature,
    }
    points = {}
    for name, x in predicted.items():
        xy = np.stack([x.ravel(), realised])
        xy = xy[:, np.isfinite(xy).all(0)]
        if xy.size:
            points[name] = xy
    return points


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def first_order_changes(rows: Rows) -> Figure | TooFew | None:
    """First-order change of a prompt under each prompt weights, by its difficulty."""
    title = "What each weighting would have done"
    names = [
        n for n in rows[-1]["weightings"] if all(n in r["weightings"] for r in rows)
    ]
    if not names:
        return None
    changes = {name: first_order(rows, name) for name in names}  # (own, others)
    rate = np.stack([pass_rates(row) for row in rows])
    finite = np.isfinite(changes[names[0]][0])
    parts = THIRDS if has_pass_rates(rows) else (("all prompts", -np.inf, np.inf),)
    masks = {n: finite & (rate >= low) & (rate < high) for n, low, high in parts}
    most = max(int(mask.sum()) for mask in masks.values())
    if most < LEAST_AVERAGED:
        what = "prompts with signal in a third of difficulty"
        return TooFew(title, most, what, LEAST_AVERAGED)

    def draw(panels: list[Any]) -> None:
        for part, (axes, title) in enumerate(
            zip(panels, ("by its own gradient", "by the others'"), strict=True)
        ):
            _bars(axes, {name: changes[name][part] for name in names}, masks)
            axes.set_title(title, fontsize=9)
        panels[0].set_ylabel("change of expected reward")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        panels[0].legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
        panels[1].legend().set_visible(False)

    counts = ", ".join(f"{mask.sum()} {name}" for name, mask in masks.items())
    hard = "hard below a pass rate of 1/3, easy from 2/3 " * (len(parts) > 1)
    caption = (
        "First-order change by a plain gradient step (of length 1, but for what "
        "gradients have in common): the part of the prompt's own sampled gradient and "
        "of the others'. Means over measurements of the mean over prompts with signal, "
        f"{hard}({counts}; none is drawn below {LEAST_AVERAGED}); thin lines: "
        "95 % intervals over measurements (Student), from four on."
    )
    return svg_figure(title, caption, draw, columns=2)


def _bars(
    axes: Any, changes: dict[str, np.ndarray], masks: dict[str, np.ndarray]
) -> None:
    """Mean change in each part with enough prompts, a bar for each prompt weights."""
    width = 0.8 / len(changes)
    of_parts = list(masks.values())
    used = [i for i, mask in enumerate(of_parts) if mask.sum() >= LEAST_AVERAGED]
    for k, (name, change) in enumerate(changes.items()):
        means = [_by_measurement(change, of_parts[i]) for i in used]
        heights = [float(finite_mean(x, 0)) for x in means]
        halves = [t_interval(x)[1] if len(x) >= 4 else np.nan for x in means]
        places = np.array(used) + (k - (len(changes) - 1) / 2) * width
        colour = COLOURS[k % len(COLOURS)]
        axes.bar(places, heights, 0.92 * width, color=colour, label=name)
        axes.errorbar(places, heights, halves, fmt="none", ecolor=BLACK, elinewidth=0.8)
    axes.axhline(0, color=BLACK, lw=0.8)
    axes.set_xticks(range(len(masks)), list(masks))
    axes.set_xlim(-0.5, len(masks) - 0.5)
    axes.grid(False, axis="x")


def _by_measurement(change: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[n] means of the masked of [N, P], of the measurements that have one."""
    means = finite_mean(np.where(mask, change, np.nan), 1)
    return means[np.isfinite(means)]
