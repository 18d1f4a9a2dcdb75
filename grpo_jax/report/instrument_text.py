"""Sentences and a table of what the rows of instrument.jsonl show, with numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS
from grpo_jax.instrument.rows import (
    Row,
    curvature_correlations,
    exact_label,
    first_order,
    is_binary,
    pass_rates,
    values,
    with_exact,
)

WIDE = 0.5  # width of a share's interval that leaves its phase open
SURE = 0.95  # share of bootstrap samples in one phase
Rows = Sequence[Row]


# ---- sentences


def reading(rows: Rows) -> list[str]:
    """Paragraphs on phase, rate factor, interference and noise of usable rows."""
    return [
        _phase_text(rows),
        _rate_text(rows),
        _interference_text(rows),
        _noise_text(rows),
    ]


def _phase_text(rows: Rows) -> str:
    labelled = [row for row in rows if row["phase"]["label"] in PHASES]
    if labelled:
        text = f"The phase, by sampled cosines: {_counted(rows, _label)}. "
        text += _certainty_text(labelled)
    else:
        text = (
            f"The phase is unknown at all of {_measurements(len(rows))}: fewer than "
            "two prompts with signal, or too little signal in them."
        )
    exact = with_exact(rows)
    if not exact:
        return text
    text += f" The exact cosines of the same prompts: {_counted(exact, exact_label)}"
    both = [row for row in exact if row["phase"]["label"] in PHASES]
    if not both:
        return text + "."
    agree = sum(exact_label(row) == row["phase"]["label"] for row in both)
    return text + f"; both agree at {agree} of {_measurements(len(both))}."


def _certainty_text(labelled: Rows) -> str:
    shares = np.nan_to_num(values(labelled, "phase", "shares")).max(1)
    low, high = values(labelled, "phase", "small_fraction_interval").T
    sure, wide = int((shares >= SURE).sum()), int((high - low > WIDE).sum())
    text = (
        f"Of {_measurements(len(labelled))} with a label, {sure} "
        f"{'has' if sure == 1 else 'have'} one phase in {_percent(SURE)} of bootstrap "
        f"samples (median: {_percent(np.median(shares))}), and {wide} "
        f"{'has' if wide == 1 else 'have'} an interval of the fraction of small "
        f"cosines wider than {WIDE:g}"
    )
    return text + (", where the label says little." if wide else ".")


def _rate_text(rows: Rows) -> str:
    factor = values(rows, "phase", "rate_factor")[-1]
    if not np.isfinite(factor):
        return "C is unknown: no prompt has two rewards."
    text = f"C = 8/3 of the mean sigma so far is {factor:.2f} at the last measurement: "
    if not is_binary(rows):
        return text + "without meaning here, since the theorem is for rewards 0 and 1."
    if factor < 1:
        text += "below 1, so the upper bound for std-normalisation is the lower one."
    else:
        text += "not below 1, so the theorem claims no gain from std-normalisation."
    return text + " It compares two upper bounds, for orthogonal prompts, and no more."


KINDS = {
    "near-orthogonal": "prompts hardly affect each other, so a scale per prompt acts "
    "on that prompt alone, as the theory assumes",
    "aligned": "prompts mostly move together, so that what one prompt's scale "
    "changes the others also do, and normalisation is nearly redundant",
    "opposed": "prompts mostly undo each other's steps, and the ones with the largest "
    "weight win",
    "of mixed sign": "some prompts are hurt by others, and if these are the hard ones "
    "normalisation is worth more, not less",
}


def kind(small: float, mean: float, std: float) -> str:
    """Key of KINDS for cosines with this small fraction, mean and std."""
    if not np.isfinite([small, mean, std]).all():
        return "unknown"
    if small >= THRESHOLDS.small_fraction:
        return "near-orthogonal"
    if abs(mean) > std:
        return "aligned" if mean > 0 else "opposed"
    return "of mixed sign"


def sampled_kind(row: Row) -> str:
    """`kind` of debiased cosines; "unknown" where their 95 % intervals allow two."""
    low, high = values([row], "phase", "mean_cosine_interval")[0]
    small = values([row], "phase", "small_fraction_interval")[0]
    std = values([row], "phase", "std_cosine_interval")[0]
    if not np.isfinite([low, high, *small, *std]).all():
        return "unknown"
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    farthest = max(abs(low), abs(high))
    if farthest >= 1:  # clipped to the largest cosine: the debiasing has failed
        return "unknown"
    if small[0] >= THRESHOLDS.small_fraction:
        return "near-orthogonal"
    if small[1] >= THRESHOLDS.small_fraction:
        return "unknown"
    if nearest > std[1]:
        return "aligned" if low > 0 else "opposed"
    return "of mixed sign" if std[0] >= farthest else "unknown"


_EXACT = ("exact", "statistics")
_EXACT_NAMES = ("small_fraction", "mean", "std")


def exact_kind(row: Row) -> str:
    """`kind` of the exact cosines."""
    if row["exact"] is None:
        return "unknown"
    return kind(*(float(values([row], *_EXACT, name)[0]) for name in _EXACT_NAMES))


def _interference_text(rows: Rows) -> str:
    exact = with_exact(rows)
    if exact:
        shown, source, kind_of = exact, "exact", exact_kind
        figures = [values(exact, *_EXACT, name) for name in _EXACT_NAMES]
    else:
        shown, source, kind_of = rows, "sampled (debiased)", sampled_kind
        names = ("small_fraction", "mean_cosine", "std_cosine")
        figures = [values(rows, "phase", name) for name in names]
    figures = np.stack(figures, 1)  # [N, 3]
    finite = np.flatnonzero(np.isfinite(figures).all(1))
    if not len(finite):
        return "Interference among prompts is unknown: no cosine could be estimated."
    kinds = [kind_of(row) for row in shown]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    meaning = KINDS.get(common, "the intervals allow more than one reading")
    text = (
        f"Interference among prompts: {_counted(shown, kind_of)}. Where it is "
        f"{common}, {meaning}. The {source} cosines: "
    )
    text += "; ".join(
        f"at step {shown[i]['step']} mean {figures[i, 1]:+.2f}, std "
        f"{figures[i, 2]:.2f}, {_percent(figures[i, 0])} of them below 0.1 in size"
        for i in dict.fromkeys([finite[0], finite[-1]])
    )
    return f"{text}. {_mean_cosine_text(rows)}{_others_text(rows)}"


def _mean_cosine_text(rows: Rows) -> str:
    low, high = values(rows, "phase", "mean_cosine_interval").T
    count = int((np.isfinite(low) & np.isfinite(high)).sum())
    if not count:
        return ""
    return (
        f"The 95 % interval over prompts of the sampled mean cosine is above 0 at "
        f"{int((low > 0).sum())} of {_measurements(count)}, below 0 at "
        f"{int((high < 0).sum())}."
    )


def _others_text(rows: Rows) -> str:
    own, others = first_order(rows, "reinforce")
    hard = np.isfinite(others) & (np.stack([pass_rates(row) for row in rows]) < 1 / 3)
    if not hard.any():
        return " No measurement has a prompt with signal and a pass rate below 1/3."
    mean = others[hard].mean()
    return (
        f" Prompts with a pass rate below 1/3 ({hard.sum()} over all measurements) "
        f"gain {own[hard].mean():+.3g} through their own gradient and {mean:+.3g} "
        "through the others' in a plain gradient step of length 1: interference "
        f"{'helps' if mean > 0 else 'hurts'} them on average, and hurts "
        f"{_percent((others[hard] < 0).mean())} of them."
    )


def _noise_text(rows: Rows) -> str:
    attenuation = values(rows, "geometry", "attenuation")
    finite = attenuation[np.isfinite(attenuation)]
    if not len(finite):
        return (
            "Sampling noise hides the cosines at every measurement: less than a tenth "
            "of the squared gradient norms is signal."
        )
    text = (
        f"Sampling noise shrinks raw cosines to {_percent(np.median(finite))} of the "
        f"true ones at the median measurement ({_percent(finite.min())} to "
        f"{_percent(finite.max())}"
    )
    if hidden := len(attenuation) - len(finite):
        text += (
            f"; at {hidden} of {_measurements(len(attenuation))} to less than a tenth, "
            "too little to debias"
        )
    text += ")."
    exact = with_exact(rows)
    sampled = values(exact, "phase", "std_cosine")
    true = values(exact, "exact", "statistics", "std")
    both = np.isfinite(sampled) & np.isfinite(true)
    if both.any():
        text += (
            f" Debiased, the std of the cosines is {np.median(sampled[both]):.3f} "
            f"(median); the exact one is {np.median(true[both]):.3f}."
        )
    return text


def _label(row: Row) -> str:
    return row["phase"]["label"]


def _counted(rows: Rows, label_of: Callable[[Row], str]) -> str:
    """Counts of each label, such as "I at 3 of 5 measurements, unknown at 2"."""
    labels = [label_of(row) for row in rows]
    counts = sorted({x: labels.count(x) for x in labels}.items(), key=lambda x: -x[1])
    parts = [f"{label} at {n}" for label, n in counts]
    parts[0] += f" of {_measurements(len(rows))}"
    return ", ".join(parts)


def _measurements(n: int) -> str:
    return "1 measurement" if n == 1 else f"{n} measurements"


# ---- the table

HEADER = (
    "step", "phase", "I / II / III", "|cos| < 0.1 [95 %]", "std cos [95 %]",
    "mean cos [95 %]", "exact phase", "exact mean |cos|", "exact std", "attenuation",
    "violating", "C", "chi", "rank corr.", "exact rank corr.", "features raw",
    "centred",
)  # fmt: skip
TABLE_NOTE = (
    "I / II / III: shares of bootstrap samples of the prompts, whose 2.5 and 97.5 "
    "percentiles the intervals are. Cosines are debiased; violating: share of pairs "
    "with a negative inner product, chi: largest eigenvalue of the raw cosines, both "
    "with sampling noise in them. Rank corr.: Spearman, |curvature| along the prompt's "
    "gradient against sigma squared. Features: mean cosine of hidden states."
)


def table(rows: Rows) -> list[list[str]]:
    """One line of HEADER's figures per row; "-" where a figure is missing."""
    return [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    phase, geometry, exact = row["phase"], row["geometry"], row["exact"]
    shares = " / ".join(f"{x:.2f}" for x in phase["shares"] if x is not None)
    true = {"mean_abs": None, "std": None} if exact is None else exact["statistics"]
    return [
        str(row["step"]),
        phase["label"],
        shares if phase["label"] in PHASES else "-",
        *(
            f"{_number(phase[name])}\n{_interval(phase[f'{name}_interval'])}"
            for name in ("small_fraction", "std_cosine", "mean_cosine")
        ),
        "-" if exact is None else exact_label(row),
        _number(true["mean_abs"]),
        _number(true["std"]),
        _number(geometry["attenuation"]),
        _number(geometry["violating_fraction"]),
        _number(phase["rate_factor"]),
        _number(geometry["chi"]),
        *(_number(x) for x in curvature_correlations(row)),
        _number(row["features"]["raw"]["mean"]),
        _number(row["features"]["centred"]["mean"]),
    ]


def _number(x: float | None) -> str:
    value = float(np.asarray(x, float))
    return f"{round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "-"


def _percent(share: float | np.floating) -> str:
    return f"{100 * share:.0f} %"


def _interval(interval: Sequence[float | None]) -> str:
    low, high = (_number(x) for x in interval)
    return "" if "-" in (low, high) else f"[{low}, {high}]"
