"""The report's section on one run's instrument: why and when normalisation helped."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.advantages import expected_group_std
from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS, change_points
from grpo_jax.instrument.rows import (
    THIRDS,
    curvature_correlations,
    first_order,
    is_binary,
    pairs,
    pass_rates,
    sampled_curvature,
    usable,
    values,
    with_exact,
    with_update,
)
from grpo_jax.report.instrument_text import HEADER, TABLE_NOTE, reading, table
from grpo_jax.report.svg import COLOURS, GREY, svg_figure

BLUE, ORANGE = COLOURS[:2]
DIFFICULTY = {"hard": ORANGE, "middle": "#b9a44c", "easy": BLUE}
PHASE_COLOURS: dict[str, str] = {"I": BLUE, "II": "#b9a44c", "III": ORANGE}


def instrument_section(name: str, rows: Sequence[dict]) -> dict | None:
    """What the page shows of instrument.jsonl's rows; None where there is nothing.

    Args:
        name: The run's, in every title; empty where the page is about one run.
        rows: As read.

    Returns:
        Its name, reading (sentences), figures (one per FIGURES; None where its data are
        missing), header, rows and note of the table.
    """
    rows = usable(rows)
    if not rows:
        return None
    figures = [draw(rows) for draw in FIGURES]
    if name:
        figures = [f and f | {"title": f"{f['title']}: {name}"} for f in figures]
    return {
        "name": name,
        "reading": reading(rows),
        "figures": figures,
        "header": HEADER,
        "rows": table(rows),
        "table_note": TABLE_NOTE,
    }


def _steps(rows):
    return values(rows, "step")


def _what_rates(rows):
    return "group mean" if rows[0]["pass_rate"] is None else "exact pass rate"


# ---- prompts over the run


def _first_thirds(rows):
    """{name: indices}, thirds of the prompts by their rate at the first look."""
    order = np.argsort(np.nan_to_num(pass_rates(rows[0])), kind="stable")
    return dict(zip(DIFFICULTY, np.array_split(order, 3), strict=True))


def _prompt_lines(rows, series, label):
    def draw(axes):
        steps, first = _steps(rows), pass_rates(rows[0])
        for name, chosen in _first_thirds(rows).items():
            known = first[chosen][np.isfinite(first[chosen])]
            if not len(known):
                continue
            colour = DIFFICULTY[name]
            axes.plot(
                steps, series[:, chosen], color=colour, alpha=0.4, lw=0.8, marker=".",
                ms=3, mew=0,
            )  # fmt: skip
            text = f"{name}: {known.min():.2f} to {known.max():.2f} at first"
            middle = _nan_mean(series[:, chosen], 1)
            axes.plot(steps, middle, color=colour, lw=2.4, marker="o", ms=3, label=text)
        axes.set(xlabel="step", ylabel=label)
        if np.nanmin(series) >= 0:
            axes.set_ylim(bottom=0)

    return draw


def _pass_rates(rows):
    series = np.stack([pass_rates(row) for row in rows])
    if not np.isfinite(series).any():
        return None
    what = _what_rates(rows)
    caption = (
        f"The {what} of every probe prompt at every look, in thirds of difficulty at "
        "the first look, with their means."
    )
    title = "Probe prompts' pass rates"
    return svg_figure(title, caption, _prompt_lines(rows, series, what))


def _sigmas(rows):
    exact = rows[0]["pass_rate"] is not None
    series = values(rows, "sigma")
    if exact:
        p = np.stack([pass_rates(row) for row in rows])
        series = np.sqrt(np.clip(p * (1 - p), 0, None))
    if not np.isfinite(series).any():
        return None
    what = "sqrt(p (1 - p)), exact" if exact else "of its group, unbiased variance"
    caption = (
        f"Std of every probe prompt's reward ({what}), same colours: normalisation "
        "multiplies a prompt's gradient by its inverse."
    )
    title = "Probe prompts' sigma"
    return svg_figure(title, caption, _prompt_lines(rows, series, "sigma"))


def _pass_rate_and_std(rows):
    """Each probe prompt's exact pass rate against the std its sampled group showed."""
    rows = [row for row in rows if row["pass_rate"] is not None]
    known = [
        np.isfinite(pass_rates(row) + values([row], "group_std")).any() for row in rows
    ]
    if not any(known):
        return None
    group = rows[-1]["group_size"]

    def draw(axes):
        grid = np.linspace(0, 1, 101)
        axes.plot(grid, np.sqrt(grid * (1 - grid)), color=GREY, lw=1, label="sigma(p)")
        axes.plot(
            grid,
            np.asarray(expected_group_std(grid, group)),
            color=GREY,
            ls=":",
            label=f"groups of {group}, on average",
        )
        for row, face in _ends(rows, BLUE):
            axes.scatter(
                pass_rates(row),
                values([row], "group_std")[0],
                s=22,
                facecolors=face,
                edgecolors=BLUE,
                label=f"step {row['step']}",
            )
        axes.set(xlabel="exact pass rate of a probe prompt", ylabel="std of its group")
        axes.set_xlim(-0.03, 1.03)

    caption = (
        "Each probe prompt at the first look (open) and at the last (full). Where a "
        "group shows no spread it is tied: its weight is exactly 0."
    )
    return svg_figure("Pass rate against std", caption, draw)


def _ends(rows, colour):
    """The first row, drawn open, and the last, full; the only one of one look, full."""
    return [(rows[0], "none"), (rows[-1], colour)][len(rows) == 1 :]


# ---- curvature


def _curvature(rows):
    """sigma^2 against |curvature| along the own gradient, and the theory's bound."""
    binary, exact = is_binary(rows), with_exact(rows)
    kinds = [("sampled", BLUE, rows, sampled_curvature)]
    if exact:
        kinds.append(("exact", ORANGE, exact, _exact_curvature))
    points = {name: [of(row) for row in its] for name, _, its, of in kinds}
    known = [x for pair in points.values() for x in pair]
    drawn = [np.stack(x)[:, _positive(*x)] for x in known]
    drawn = np.concatenate(drawn, axis=1)
    if not drawn.size:
        return None
    dropped = sum(int(np.isfinite(x + y).sum()) for x, y in known) - drawn.shape[1]
    spread = values(rows, "spread")
    spread = spread[np.isfinite(spread) & (spread > 0)]

    def draw(axes):
        from matplotlib.ticker import LogLocator, NullLocator

        for name, colour, its, _ in kinds:
            between = [p for p in points[name][1:-1]]
            if between:
                x, y = np.concatenate(between, axis=1)
                keep = _positive(x, y)
                axes.scatter(x[keep], y[keep], s=5, color=colour, alpha=0.35, lw=0)
            found = dict(zip((row["step"] for row in its), points[name], strict=True))
            for row, face in _ends(its, colour):
                x, y = found[row["step"]]
                keep = _positive(x, y)
                axes.scatter(
                    x[keep],
                    y[keep],
                    s=20,
                    facecolors=face,
                    edgecolors=colour,
                    label=f"{name}, step {row['step']}",
                )
        if binary and len(spread):
            ends = np.array([drawn[0].min(), drawn[0].max()])
            label = f"bound, spread {spread.max():,.3g}".replace("e+0", "e")
            axes.plot(ends, ends * spread.max(), color="#222222", lw=1, label=label)
        axes.set(xscale="log", yscale="log")
        wide = drawn[0].max() > 100 * drawn[0].min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="sigma²", ylabel="|curvature| along own gradient")
        axes.legend(
            frameon=False, fontsize=7, ncols=3, loc="lower left",
            bbox_to_anchor=(-0.1, 1), borderaxespad=0,
        )  # fmt: skip

    caption = f"All looks (small dots between first and last); {dropped} zeros left out"
    caption += f". {_correlation_text(rows)}"
    if binary and len(spread):
        caption += (
            "The line is the bound for rewards 0 and 1 with the largest spread found "
            "in the run, a lower estimate: a point above it refutes nothing"
        )
        if exact:
            x, y = np.concatenate(points["exact"], axis=1)
            told = np.isfinite(x) & np.isfinite(y)
            above = int((y > x * spread.max())[told].sum())
            caption += f" ({above} of {told.sum()} exact ones)"
        caption += "."
    elif not binary:
        caption += "Rewards are not 0 and 1, so there is no bound in sigma²."
    return svg_figure("Curvature against variance", caption, draw, height=3.4)


def _exact_curvature(row):
    p = pass_rates(row)
    return p * (1 - p), np.abs(values([row], "exact", "curvature")[0])


def _positive(x, y):
    return np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)


def _correlation_text(rows):
    """Of both at the median look."""
    series = np.array([curvature_correlations(row) for row in rows]).T
    texts = [
        f"{np.median(x[np.isfinite(x)]):+.2f} {name}"
        for name, x in zip(("sampled", "exact"), series, strict=True)
        if np.isfinite(x).any()
    ]
    return f"Rank correlation, median look: {', '.join(texts)}. " if texts else ""


# ---- cosines and phases


def _cosines(rows):
    labels = [x for x in (*PHASES, "unknown") if any(_label(row) == x for row in rows)]
    groups = [[row for row in rows if _label(row) == label] for label in labels]
    found = [
        np.concatenate([pairs(row["geometry"]["cosines"]) for row in group])
        for group in groups
    ]
    shown = [i for i, cosines in enumerate(found) if len(cosines)]
    if not shown:
        return None
    edges = np.linspace(-1, 1, 81)

    def draw(panels):
        panels = panels if isinstance(panels, list) else [panels]
        reach = 0.2
        for axes, i in zip(panels, shown, strict=True):
            group, cosines, label = groups[i], found[i], labels[i]
            colour = PHASE_COLOURS.get(label, GREY)
            axes.hist(cosines, edges, density=True, color=colour, alpha=0.45)
            reach = max(reach, np.quantile(np.abs(cosines), 0.995))
            true = [pairs(row["exact"]["cosines"]) for row in with_exact(group)]
            if true and len(np.concatenate(true)):
                true = np.concatenate(true)
                axes.hist(
                    true, edges, density=True, histtype="step", color="#222222",
                    lw=1, label="exact",
                )  # fmt: skip
                reach = max(reach, np.quantile(np.abs(true), 0.995))
            width = values(group, "null", "std")
            width = width[np.isfinite(width)]
            if len(width) and (width > 0).any():
                width = np.sqrt((width**2).mean())
                grid = np.linspace(-1, 1, 401)
                bell = np.exp(-((grid / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
                axes.plot(grid, bell, "k:", lw=1.2, label=f"noise, std {width:.3f}")
            looks = f"{len(group)} look" + "s" * (len(group) > 1)
            axes.set_ylabel(f"{label} ({looks})")
            axes.set_yticks([])
        reach = min(1.0, 1.1 * reach)
        panels[-1].set(xlabel="cosine of two prompts' gradients", xlim=(-reach, reach))

    caption = (
        "Raw sampled cosines (filled) of the looks of each phase, exact ones (outline) "
        "where there are. Dotted: what noise alone does, from differences of a group's "
        "parts; filled ones that are no wider could be noise."
    )
    rows_of_panels = len(shown)
    return svg_figure(
        "Cosines by phase",
        caption,
        draw,
        rows=rows_of_panels,
        height=max(3.0, 0.6 + 1.05 * rows_of_panels),
    )


def _label(row):
    label = row["phase"]["label"]
    return label if label in PHASES else "unknown"


def _breaks(rows):
    """Steps halfway between two looks where the measures change level."""
    names = ("std_cosine", "small_fraction", "mean_sigma")
    series = np.stack([values(rows, "phase", name) for name in names], 1)
    finite = np.isfinite(series).all(1)
    steps = _steps(rows)[finite]
    cuts = change_points(series[finite])
    return [(steps[i - 1] + steps[i]) / 2 for i in cuts]


def _draw_breaks(axes, breaks):
    for step in breaks:
        axes.axvline(step, color="#222222", ls="--", lw=1)


def _phase_shares(rows):
    if not any(_label(row) in PHASES for row in rows):
        return None
    breaks = _breaks(rows)

    def draw(axes):
        steps = _steps(rows)
        gap = np.diff(steps).min() if len(steps) > 1 else 1.0
        known = np.array([_label(row) in PHASES for row in rows])
        shares = np.nan_to_num(values(rows, "phase", "shares")) * known[:, None]
        bottom = np.zeros(len(rows))
        for name, share in zip(PHASES, shares.T, strict=True):
            axes.bar(
                steps, share, 0.9 * gap, bottom=bottom, color=PHASE_COLOURS[name],
                alpha=0.75, lw=0, label=name,
            )  # fmt: skip
            bottom += share
        for step, row in zip(steps, rows, strict=True):
            label = _label(row)
            if len(rows) <= 20:
                text = "?" if label == "unknown" else label
                axes.text(step, 1.03, text, ha="center", fontsize=7.5)
            elif label in PHASES:
                axes.plot(step, 1.05, "s", ms=3, color=PHASE_COLOURS[label])
        _draw_breaks(axes, breaks)
        axes.set(xlabel="step", ylabel="share of bootstrap samples", ylim=(0, 1.12))
        axes.set_xlim(steps[0] - gap, steps[-1] + gap)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        if len(rows) <= 8:
            axes.set_xticks(steps)
        axes.legend(
            frameon=False, fontsize=7.5, ncols=3, loc="lower left",
            bbox_to_anchor=(0, 1), borderaxespad=0,
        )  # fmt: skip

    caption = (
        "How often resampled probe prompts give each phase, the look's own label above "
        f"(?: cannot be told); {_breaks_text(rows, breaks)}."
    )
    return svg_figure("Phases", caption, draw)


def _breaks_text(rows, breaks):
    if breaks:
        return "dashed: where cosines and sigma change level, without thresholds"
    told = sum(_label(row) in PHASES for row in rows)
    if told < 4:
        return f"{told} labelled looks are too few to look for change points"
    return "no change points"


def _phase_measures(rows):
    measures = (
        ("small_fraction", THRESHOLDS.small_fraction, "|cos| < 0.1"),
        ("std_cosine", THRESHOLDS.std_cosine, "std of cosines"),
    )
    measured = [values(rows, "phase", name) for name, _, _ in measures]
    if not np.isfinite(measured).any():
        return None
    breaks, exact = _breaks(rows), with_exact(rows)

    def draw(panels):
        for axes, (name, threshold, label), y in zip(
            panels, measures, measured, strict=True
        ):
            interval = values(rows, "phase", f"{name}_interval")
            there = np.isfinite(y) & np.isfinite(interval).all(1)
            axes.vlines(_steps(rows)[there], *interval[there].T, color=BLUE, alpha=0.4)
            axes.plot(_steps(rows), y, "o-", ms=3, lw=1, color=BLUE, label="sampled")
            if exact:
                key = "std" if name == "std_cosine" else name
                true = values(exact, "exact", "statistics", key)
                axes.plot(
                    _steps(exact), true, "s-", ms=3, lw=1, color=ORANGE, label="exact"
                )
            axes.axhline(threshold, color="#222222", ls=":", lw=1)
            _draw_breaks(axes, breaks)
            axes.set_ylabel(label)
            axes.margins(y=0.08)
        panels[1].legend().set_visible(False)
        panels[1].set_xlabel("step")

    caption = (
        "Debiased sampled values with 95 % bootstrap intervals over prompts. Dotted: "
        "the thresholds; I above the upper one, else III above the lower one, else II."
    )
    title = "What the phase is decided on"
    return svg_figure(title, caption, draw, rows=2, height=3.6)


# ---- updates and weightings


def _predictions(rows):
    """What slope and curvature predict of the next update, and what it did."""
    rows = with_update(rows)
    if not rows:
        return None
    realised = values(rows, "update", "realised").ravel()
    bent = values(rows, "update", "exact_curvature") / 2
    predicted = {
        "sampled": values(rows, "update", "predicted").ravel(),
        "exact slope and curvature": (
            values(rows, "update", "exact_slope") + bent
        ).ravel(),
    }
    both = {
        name: np.stack([x, realised])[:, np.isfinite(x) & np.isfinite(realised)]
        for name, x in predicted.items()
    }
    both = {name: xy for name, xy in both.items() if xy.size}
    if not both:
        return None

    def draw(axes):
        for (name, (x, y)), colour in zip(both.items(), (BLUE, ORANGE), strict=False):
            axes.scatter(x, y, s=9, color=colour, alpha=0.6, lw=0, label=name)
        ends = [f(y for xy in both.values() for y in xy[1]) for f in (min, max)]
        if ends[0] < ends[1]:
            axes.plot(ends, ends, color="#222222", lw=1)
        axes.set(xlabel="predicted change", ylabel="realised change")

    texts = [
        f"{_correlation(*xy):.2f} ({name}, {xy.shape[1]} changes)"
        for name, xy in both.items()
        if np.isfinite(_correlation(*xy))
    ]
    caption = (
        "Change of each probe prompt's "
        f"{'expected' if rows[0]['pass_rate'] is not None else 'sampled mean'} reward "
        "by the update after each look, against slope + curvature / 2 along it"
    )
    caption += f"; correlation {', '.join(texts)}." if texts else "."
    return svg_figure("Predicted and realised change", caption, draw)


def _correlation(x, y):
    if len(x) < 3 or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _weightings(rows):
    """To first order: own and others' part of a prompt's change, by its difficulty."""
    names = [
        n for n in rows[-1]["weightings"] if all(n in r["weightings"] for r in rows)
    ]
    changes = {name: first_order(rows, name) for name in names}
    rate = np.stack([pass_rates(row) for row in rows])
    if not any(np.isfinite(own).any() for own, _ in changes.values()):
        return None
    known = np.isfinite(next(iter(changes.values()))[0])
    masks = [known & (rate >= low) & (rate < high) for _, low, high in THIRDS]
    used = [i for i, mask in enumerate(masks) if mask.any()]

    def draw(panels):
        width = 0.8 / len(names)
        for part, (axes, title) in enumerate(
            zip(panels, ("its own", "the others'"), strict=True)
        ):
            for k, name in enumerate(names):
                heights = [
                    float(_nan_mean(changes[name][part][masks[i]], 0)) for i in used
                ]
                places = np.array(used) + (k - (len(names) - 1) / 2) * width
                colour = COLOURS[k % len(COLOURS)]
                axes.bar(places, heights, 0.92 * width, color=colour, label=name)
            axes.axhline(0, color="#222222", lw=0.8)
            axes.set_title(title, fontsize=9)
            axes.set_xticks(range(3), [name for name, *_ in THIRDS])
            axes.set_xlim(-0.5, 2.5)
            axes.grid(False, axis="x")
        panels[0].set_ylabel("change of expected reward")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        panels[0].legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
        panels[1].legend().set_visible(False)

    counts = ", ".join(
        f"{masks[i].sum()} {name}" for i, (name, *_) in enumerate(THIRDS)
    )
    caption = (
        "To first order, for a plain gradient step of length 1; others' share below 0 "
        "is interference. Means over looks and prompts with signal, hard below a pass "
        f"rate of 1/3, easy from 2/3 ({counts})."
    )
    title = "What each weighting would have done"
    return svg_figure(title, caption, draw, columns=2)


def _nan_mean(x, axis):
    """The mean of what is finite; NaN, without a warning, where nothing is."""
    there = np.isfinite(x)
    count = there.sum(axis)
    total = np.where(there, x, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


FIGURES = (
    _pass_rates,
    _sigmas,
    _curvature,
    _pass_rate_and_std,
    _phase_shares,
    _phase_measures,
    _predictions,
    _weightings,
    _cosines,
)
