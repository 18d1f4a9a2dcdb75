"""Figures of the probe prompts: pass rates, their spread, and the curvature."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import expected_group_std
from grpo_jax.instrument.rows import (
    Row,
    curvature_correlations,
    exact_curvature,
    finite_mean,
    has_pass_rates,
    is_binary,
    pass_rates,
    sampled_curvature,
    values,
    with_exact,
)
from grpo_jax.report.svg import (
    BLACK,
    BLUE,
    GREY,
    LEAST_DOTS,
    ORANGE,
    SAND,
    Figure,
    TooFew,
    svg_figure,
    too_few_measurements,
)

Rows = list[Row]
LEAST_IN_THIRDS = 6  # prompts: two in each third of difficulty
DIFFICULTY = {"hard": ORANGE, "middle": SAND, "easy": BLUE}


# ---- over the run


def pass_rates_by_difficulty(rows: Rows) -> Figure | TooFew | None:
    """Every probe prompt's pass rate over the run."""
    title = "Probe prompts' pass rates"
    if not has_pass_rates(rows):
        title = "Probe prompts' mean rewards"
    series = np.stack([pass_rates(row) for row in rows])
    if few := _too_few(title, series):
        return few
    what = "group mean" if rows[0]["pass_rate"] is None else "exact pass rate"
    caption = (
        f"The {what} of every probe prompt at every measurement, in thirds of "
        "difficulty at the first one, with their means."
    )
    return svg_figure(title, caption, _prompt_lines(rows, series, what))


def _too_few(title: str, series: np.ndarray) -> TooFew | None:
    """Of a figure of [N, P] over the run, in thirds of difficulty."""
    prompts = int(np.isfinite(series).any(0).sum())
    if prompts < LEAST_IN_THIRDS:
        return TooFew(title, prompts, "probe prompts", LEAST_IN_THIRDS)
    return too_few_measurements(title, len(series))


def sigmas(rows: Rows) -> Figure | TooFew | None:
    """The std of every probe prompt's reward over the run."""
    title = "Probe prompts' sigma"
    exact = rows[0]["pass_rate"] is not None
    series = values(rows, "sigma")
    if exact:
        p = np.stack([pass_rates(row) for row in rows])
        series = np.sqrt(np.clip(p * (1 - p), 0, None))
    if few := _too_few(title, series):
        return few
    what = "sqrt(p (1 - p)), exact" if exact else "of its group, ddof 1"
    caption = (
        f"Std of every probe prompt's reward ({what}), same colours: normalisation "
        "multiplies a prompt's gradient by its inverse."
    )
    return svg_figure(title, caption, _prompt_lines(rows, series, "sigma"))


def _prompt_lines(rows: Rows, series: np.ndarray, label: str) -> Callable[[Any], None]:
    """A drawing of series [N, P] over the steps, and of the means by difficulty."""

    def draw(axes: Any) -> None:
        steps, first = values(rows, "step"), pass_rates(rows[0])
        for name, indices in _thirds(rows).items():
            rates = first[indices][np.isfinite(first[indices])]
            if not len(rates):
                continue
            style = {"color": DIFFICULTY[name], "marker": "."}
            thin = {"alpha": 0.4, "lw": 0.8, "ms": 3, "mew": 0}
            axes.plot(steps, series[:, indices], **style, **thin)
            axes.plot(
                steps,
                finite_mean(series[:, indices], 1),
                color=DIFFICULTY[name],
                lw=2.4,
                marker="o",
                ms=3,
                label=f"{name}: {rates.min():.2f} to {rates.max():.2f} at first",
            )
        axes.set(xlabel="step", ylabel=label)
        if np.nanmin(series) >= 0:
            axes.set_ylim(bottom=0)

    return draw


def _thirds(rows: Rows) -> dict[str, np.ndarray]:
    """Indices of the prompts in thirds by their rate in the first row."""
    order = np.argsort(np.nan_to_num(pass_rates(rows[0])), kind="stable")
    return dict(zip(DIFFICULTY, np.array_split(order, 3), strict=True))


# ---- at the first and the last measurement


def pass_rate_against_std(rows: Rows) -> Figure | TooFew | None:
    """Each probe prompt's exact pass rate against the std of its sampled group."""
    title = "Pass rate against std"
    rows = [row for row in rows if row["pass_rate"] is not None]
    if not rows:
        return None
    dots = [
        int(np.isfinite(pass_rates(row) + values([row], "group_std")[0]).sum())
        for row in rows
    ]
    if max(dots) < LEAST_DOTS:
        return TooFew(title, max(dots), "probe prompts", LEAST_DOTS)
    group = rows[-1]["group_size"]

    def draw(axes: Any) -> None:
        grid = np.linspace(0, 1, 101)
        expected = np.asarray(expected_group_std(jnp.asarray(grid), group))
        axes.plot(grid, np.sqrt(grid * (1 - grid)), color=GREY, lw=1, label="sigma(p)")
        label = f"groups of {group}, on average"
        axes.plot(grid, expected, color=GREY, ls=":", label=label)
        for row, face in _first_and_last(rows, BLUE):
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
        "Each probe prompt at the first measurement (open) and the last (filled). A "
        "group of std 0 is tied: its weight is exactly 0."
    )
    return svg_figure(title, caption, draw)


def _first_and_last(rows: Rows, colour: str) -> list[tuple[Row, str]]:
    """(row, face colour): the first open, the last filled; a single one filled."""
    both = [(rows[0], "none"), (rows[-1], colour)]
    return both if len(rows) > 1 else both[1:]


# ---- curvature


class _Points(NamedTuple):
    """sigma^2 and |curvature| of P prompts at N measurements, sampled or exact."""

    name: str
    colour: str
    rows: Rows  # N
    xy: list[np.ndarray]  # N of [2, P]

    def drawable(self, i: int) -> np.ndarray:
        """[2, n] the points of one measurement that have logarithms."""
        return self.xy[i][:, _positive(self.xy[i])]

    def all_drawable(self) -> np.ndarray:
        """[2, n] those of all measurements."""
        parts = [self.drawable(i) for i in range(len(self.rows))]
        return np.concatenate(parts, axis=1)


def _positive(xy: np.ndarray) -> np.ndarray:
    return np.all(np.isfinite(xy) & (xy > 0), axis=0)


def curvature_against_variance(rows: Rows) -> Figure | TooFew | None:
    """|curvature| along each prompt's gradient against sigma^2, and the bound."""
    title = "Curvature against variance"
    kinds = [_Points("sampled", BLUE, rows, _stacked(sampled_curvature, rows))]
    if exact := with_exact(rows):
        kinds += [_Points("exact", ORANGE, exact, _stacked(exact_curvature, exact))]
    dots = [kind.all_drawable().shape[1] for kind in kinds]
    if max(dots) < LEAST_DOTS:
        what = "prompts with a curvature and a sigma above 0"
        return TooFew(title, max(dots), what, LEAST_DOTS)
    kinds = [k for k, n in zip(kinds, dots, strict=True) if n >= LEAST_DOTS]
    drawn = np.concatenate([kind.all_drawable() for kind in kinds], axis=1)
    points = sum(xy.shape[1] for kind in kinds for xy in kind.xy)
    left_out = f"{points - drawn.shape[1]} of {points} points"
    spreads = values(rows, "spread")
    spreads = spreads[np.isfinite(spreads) & (spreads > 0)]
    spread = float(spreads.max()) if is_binary(rows) and len(spreads) else None

    def draw(axes: Any) -> None:
        for kind in kinds:
            _scatter(axes, kind)
        if spread is not None:
            ends = np.array([drawn[0].min(), drawn[0].max()])
            label = f"bound, spread {spread:,.3g}".replace("e+0", "e")
            axes.plot(ends, ends * spread, color=BLACK, lw=1, label=label)
        _logarithmic(axes, drawn[0])

    caption = _curvature_caption(rows, kinds, left_out, spread)
    return svg_figure(title, caption, draw, height=3.4)


def _stacked(
    of: Callable[[Row], tuple[np.ndarray, np.ndarray]], rows: Rows
) -> list[np.ndarray]:
    return [np.stack(of(row)) for row in rows]


def _scatter(axes: Any, kind: _Points) -> None:
    last = len(kind.rows) - 1
    if last > 1:
        x, y = np.concatenate([kind.drawable(i) for i in range(1, last)], axis=1)
        axes.scatter(x, y, s=5, color=kind.colour, alpha=0.35, lw=0)
    for row, face in _first_and_last(kind.rows, kind.colour):
        axes.scatter(
            *kind.drawable(0 if row is kind.rows[0] else last),
            s=20,
            facecolors=face,
            edgecolors=kind.colour,
            label=f"{kind.name}, step {row['step']}",
        )


def _logarithmic(axes: Any, x: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    wide = x.max() > 100 * x.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="sigma²", ylabel="|curvature| along its gradient")
    axes.legend(
        frameon=False,
        fontsize=7,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(-0.1, 1),
        borderaxespad=0,
    )


def _curvature_caption(
    rows: Rows, kinds: list[_Points], left_out: str, spread: float | None
) -> str:
    caption = (
        "Each probe prompt at every measurement (small dots between the first and the "
        f"last); {left_out} are left out, as a half of the group has no signal or a "
        f"figure is 0. {_correlation_text(rows)}"
    )
    if spread is None:
        if not is_binary(rows):
            caption += "Rewards are not 0 and 1, so there is no bound in sigma²."
        return caption
    caption += (
        "The line is the bound for rewards 0 and 1, sigma² times the largest spread "
        "measured in the run; that is a lower estimate of the spread, so that points "
        "may be above the line"
    )
    for kind in kinds:
        if kind.name == "exact":
            x, y = np.concatenate(kind.xy, axis=1)
            finite = np.isfinite(x) & np.isfinite(y)
            above = int((y > x * spread)[finite].sum())
            caption += f" ({above} of {finite.sum()} exact ones)"
    return caption + "."


def _correlation_text(rows: Sequence[Row]) -> str:
    series = np.array([curvature_correlations(row) for row in rows]).T
    texts = [
        f"{np.median(x[np.isfinite(x)]):+.2f} {name}"
        for name, x in zip(("sampled", "exact"), series, strict=True)
        if np.isfinite(x).any()
    ]
    if not texts:
        return ""
    note = (
        " (noise alone gives sampled ones up to +.3: it grows with sigma)"
        if np.isfinite(series[0]).any()
        else ""
    )
    text = f"Median rank correlation: {', '.join(texts)}{note}. "
    if len(rows) == 1 and np.isfinite(series[0]).any():
        count = int(np.isfinite(sampled_curvature(rows[0])[1]).sum())
        text += (
            f"Of {count} prompts whose curvature and sigma have nothing in common, it "
            f"is within +-{by_chance(count):.2f} in 95 % of cases. "
        )
    return text


def by_chance(count: int) -> float:
    """Size that the rank correlation of n unrelated pairs exceeds in 5 % of cases at
    most, by its std, (n - 1)^-1/2."""
    return min(1.0, 1.96 / (count - 1) ** 0.5) if count > 1 else 1.0
