"""Figures of cosines between the probe prompts' gradients, and of the phases."""

from typing import Any

import numpy as np

from grpo_jax.diagnostics.cosines import LEAST_PROMPTS
from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS
from grpo_jax.instrument.rows import Row, pairs, signal_prompts, values, with_exact
from grpo_jax.report.svg import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SAND,
    Figure,
    TooFew,
    svg_figure,
    too_few_measurements,
)

Rows = list[Row]
PHASE_COLOURS = {"I": BLUE, "II": SAND, "III": ORANGE}


def _label(row: Row) -> str:
    label = row["phase"]["label"]
    return label if label in PHASES else "unknown"


# ---- cosines


def cosines_by_phase(rows: Rows) -> Figure | TooFew | None:
    """Histograms of the cosines of all pairs, one panel a phase."""
    title = "Cosines by phase"
    with_signal = [signal_prompts(row["geometry"]["cosines"]) for row in rows]
    if max(with_signal) < LEAST_PROMPTS:
        what = "prompts with signal in a measurement"
        return TooFew(title, max(with_signal), what, LEAST_PROMPTS)
    rows = [r for r, n in zip(rows, with_signal, strict=True) if n >= LEAST_PROMPTS]
    panels = []  # (label, rows, [N] cosines)
    for label in (*PHASES, "unknown"):
        group = [row for row in rows if _label(row) == label]
        if group:
            cosines = [pairs(row["geometry"]["cosines"]) for row in group]
            panels.append((label, group, np.concatenate(cosines)))

    def draw(axes: Any) -> None:
        axes = axes if isinstance(axes, list) else [axes]
        reach = 0.2
        for one, panel in zip(axes, panels, strict=True):
            reach = max(reach, _histogram(one, *panel))
        reach = min(1.0, 1.1 * reach)
        axes[-1].set(xlabel="cosine of two prompts' gradients", xlim=(-reach, reach))

    caption = (
        "Raw sampled cosines (filled) of the n measurements in each phase, and exact "
        "ones (outline, if one answer is right). Dotted: sampling noise alone, from "
        "differences between a group's parts; sampled cosines no wider than that could "
        "be noise."
    )
    return svg_figure(
        title,
        caption,
        draw,
        rows=len(panels),
        height=max(3.0, 0.6 + 1.05 * len(panels)),
    )


def _histogram(axes: Any, label: str, rows: Rows, cosines: np.ndarray) -> float:
    """Draws one panel; returns the |cos| that nearly all of it is below."""
    edges = np.linspace(-1, 1, 81)
    colour = PHASE_COLOURS.get(label, GREY)
    axes.hist(cosines, edges, density=True, color=colour, alpha=0.45)
    reach = np.quantile(np.abs(cosines), 0.995)
    exact = [
        pairs(x["cosines"])
        for row in rows
        if (x := row["exact"]) and signal_prompts(x["cosines"]) >= LEAST_PROMPTS
    ]
    if exact:
        true = np.concatenate(exact)
        style = {"histtype": "step", "color": BLACK, "lw": 1, "label": "exact"}
        axes.hist(true, edges, density=True, **style)
        reach = max(reach, np.quantile(np.abs(true), 0.995))
    width = values(rows, "null", "std")
    width = width[np.isfinite(width)]
    if len(width) and (width > 0).any():
        width = np.sqrt((width**2).mean())
        grid = np.linspace(-1, 1, 401)
        bell = np.exp(-((grid / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
        axes.plot(grid, bell, "k:", lw=1.2, label=f"noise, std {width:.3f}")
    axes.set_ylabel(f"{label}, n = {len(rows)}")
    axes.set_yticks([])
    return float(reach)


# ---- phases


def phase_shares(rows: Rows) -> Figure | TooFew | None:
    """Shares of draws in which a phase is certain over the run, and the labels."""
    if few := too_few_measurements("Phases", len(rows)):
        return few
    if not np.nansum(values(rows, "phase", "shares")) > 0:
        return None

    def draw(axes: Any) -> None:
        steps = values(rows, "step")
        gap = np.diff(steps).min()
        _stacked_shares(axes, rows, steps, gap)
        _labels(axes, rows, steps)
        axes.set(xlabel="step", ylabel="share of draws", ylim=(0, 1.12))
        axes.set_xlim(steps[0] - gap, steps[-1] + gap)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        if len(rows) <= 8:
            axes.set_xticks(steps)
        axes.legend(
            frameon=False,
            fontsize=7.5,
            ncols=3,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0,
        )

    caption = (
        "Share of draws from the distribution of the estimates (prompts and sampling "
        "noise) in which a phase is certain; the rest leaves more than one possible. "
        "Above: the label, where a share is 95 % or more (?: unknown)."
    )
    return svg_figure("Phases", caption, draw)


def _stacked_shares(axes: Any, rows: Rows, steps: np.ndarray, gap: float) -> None:
    shares = np.nan_to_num(values(rows, "phase", "shares"))
    bottom = np.zeros(len(rows))
    for name, share in zip(PHASES, shares.T, strict=True):
        style = {"color": PHASE_COLOURS[name], "alpha": 0.75, "lw": 0, "label": name}
        axes.bar(steps, share, 0.9 * gap, bottom=bottom, **style)
        bottom += share


def _labels(axes: Any, rows: Rows, steps: np.ndarray) -> None:
    """The labels above their bars, as marks where they would be too many."""
    for step, row in zip(steps, rows, strict=True):
        label = _label(row)
        if len(rows) <= 20:
            text = "?" if label == "unknown" else label
            axes.text(step, 1.03, text, ha="center", fontsize=7.5)
        elif label in PHASES:
            axes.plot(step, 1.05, "s", ms=3, color=PHASE_COLOURS[label])


def phase_measures(rows: Rows) -> Figure | TooFew | None:
    """The two statistics that decide the phase, over the run."""
    title = "The statistics that decide the phase"
    if few := too_few_measurements(title, len(rows)):
        return few
    measures = (  # (field, field of the exact statistics, threshold, label)
        ("small_fraction", "small_fraction", THRESHOLDS.small_fraction, "|cos| < 0.1"),
        ("std_cosine", "std", THRESHOLDS.std_cosine, "std of cosines"),
    )
    measured = [values(rows, "phase", name) for name, *_ in measures]
    if not np.isfinite(measured).any():
        return None
    exact, steps = with_exact(rows), values(rows, "step")

    def draw(panels: list[Any]) -> None:
        style = {"ms": 3, "lw": 1}
        for axes, (name, exact_name, threshold, label), y in zip(
            panels, measures, measured, strict=True
        ):
            interval = values(rows, "phase", f"{name}_interval")
            finite = np.isfinite(y) & np.isfinite(interval).all(1)
            axes.vlines(steps[finite], *interval[finite].T, color=BLUE, alpha=0.4)
            axes.plot(steps, y, "o", color=BLUE, label="sampled", **style)
            axes.plot(*smooth(steps, y), color=BLUE, lw=1.6)
            if exact:
                true = values(exact, "exact", "statistics", exact_name)
                x = values(exact, "step")
                axes.plot(x, true, "s-", color=ORANGE, label="exact", **style)
            axes.axhline(threshold, color=BLACK, ls=":", lw=1)
            axes.set_ylabel(label)
            axes.margins(y=0.08)
        panels[1].legend().set_visible(False)
        panels[1].set_xlabel("step")

    caption = (
        "Debiased sampled values with 95 % intervals, of prompts and sampling noise. "
        "The small fraction's holds for any distribution of cosines; its point assumes "
        "that noise keeps the distribution's shape. Dotted: "
        "the thresholds; I above the upper one, else III above the lower one, else II. "
        "The curve is a local linear fit through five sampled values or more: they are "
        "too few to show whether a change was sudden or gradual."
    )
    return svg_figure(title, caption, draw, rows=2, height=3.6)


def smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local linear fit through the finite (x, y) [N]: places [101] and values [101].

    Weights are normal, of std a sixth of the range of x. Empty for fewer than five.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 5 or np.ptp(x) == 0:
        return np.zeros(0), np.zeros(0)
    grid = np.linspace(x.min(), x.max(), 101)
    offset = (x - grid[:, None]) / (np.ptp(x) / 6)  # [101, N]
    weight = np.exp(-(offset**2) / 2)
    s0, s1, s2 = (np.sum(weight * offset**k, 1) for k in range(3))
    weight *= s2[:, None] - s1[:, None] * offset
    return grid, weight @ y / (s0 * s2 - s1**2)
