"""Sentences and a table of what the rows of instrument.jsonl show, with numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.diagnostics.cosines import LEAST_PROMPTS
from grpo_jax.diagnostics.phases import PHASES, SURE, THRESHOLDS
from grpo_jax.instrument.rows import (
    Row,
    curvature_correlations,
    exact_label,
    finite_mean,
    has_pass_rates,
    is_binary,
    is_older,
    signal_prompts,
    values,
    with_exact,
)
from grpo_jax.intervals import mean_interval
from grpo_jax.report.interference import Effect, effect_on_hard
from grpo_jax.report.needed import prompts_text

Rows = Sequence[Row]


# ---- sentences


def reading(rows: Rows) -> list[str]:
    """Paragraphs on phase, rate factor, interference and noise of usable rows; of very
    few probe prompts, one sentence."""
    prompts = len(rows[-1]["sigma"])
    if prompts < LEAST_PROMPTS:
        return [
            f"{prompts} prompt{'s were' if prompts > 1 else ' was'} measured: at least "
            f"{LEAST_PROMPTS} with signal are needed to say anything of phase, "
            f"interference or noise. {prompts_text(rows[-1]['group_size'])}"
        ]
    return [
        *_nothing_told(rows),
        _phase_text(rows),
        _rate_text(rows),
        _interference_text(rows),
        _noise_text(rows),
    ]


def _nothing_told(rows: Rows) -> list[str]:
    """The answer, where there is none."""
    told = any(row["phase"]["label"] in PHASES for row in rows)
    told |= any(kind_of(row) in KINDS for row in rows for kind_of in _KINDS_OF)
    if told:
        return []
    return ["Whether normalisation helps on these prompts is not told by what follows."]


def _phase_text(rows: Rows) -> str:
    labelled = [row for row in rows if row["phase"]["label"] in PHASES]
    if labelled:
        text = f"The phase, by sampled cosines: {_counted(rows, _label)}. "
        text += _certainty_text(labelled)
    else:
        text = (
            f"The phase is unknown{_everywhere(rows)}: too few prompts with signal, or "
            "noise leaves more than one phase possible. "
            f"{prompts_text(rows[-1]['group_size'])}"
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
    text = (
        f"A label holds in {_percent(SURE)} of draws from the distribution of the "
        "estimates, whatever the distribution of the cosines; elsewhere the phase is "
        "unknown."
    )
    if older := sum(is_older(row) for row in labelled):
        text += (
            f" Not so the labels of {_measurements(older)} by an earlier version: "
            "they and the intervals beside them are wrong more often than 1 in 20."
        )
    return text


def _rate_text(rows: Rows) -> str:
    low, high = rate_factor_interval(rows)
    if not np.isfinite([low, high]).all():
        return "C is unknown: no two prompts have two rewards each."
    exact = rows[-1]["pass_rate"] is not None
    if not exact and not np.nanmax(values(rows, "sigma")):
        return (
            "No group has two different rewards: nothing is learned from these "
            "samples, whatever the weights."
        )
    if not is_binary(rows):
        text = "C says nothing here, since its theorem is for rewards 0 and 1."
        return text + _spread_text(rows)
    single = len(rows) == 1
    text = f"C = 8/3 of the mean sigma {'' if single else 'so far '}is "
    at = "" if single else " at the last measurement"
    if exact:
        text += f"{low:.3f}{at}, by exact pass rates: "
    else:
        text += (
            f"between {low:.2f} and {high:.2f}{at} (95 %, over prompts; a group's "
            "sigma is too low on average, that of its square is too high): "
        )
    if high < 1:
        text += "below 1, so the upper bound for std-normalisation is the lower one."
    elif low >= 1:
        text += "not below 1, so the theorem claims no gain from std-normalisation."
    else:
        text += "whether it is below 1, as the theorem wants for a gain, is not known."
    text += " It compares two upper bounds, for orthogonal prompts, and no more."
    return text + _spread_text(rows)


def _spread_text(rows: Rows) -> str:
    """How unequal the weights of std-normalisation are."""
    sigma = values(rows[-1:], "sigma")[0]
    sigma = sigma[sigma > 0]
    if len(sigma) < 2:
        return ""
    ratio = np.percentile(sigma, 95) / np.percentile(sigma, 5)
    at = "" if len(rows) == 1 else " at the last measurement"
    return (
        f" The groups' sigma varies by a factor of {ratio:.2g}{at} where two rewards "
        "differ (95th over 5th percentile, sampling noise included), and so do the "
        "weights 1 / sigma: but for a common scale that is all that normalisation "
        "changes."
    )


def rate_factor_interval(rows: Rows) -> tuple[float, float]:
    """(low, high) of C: equal where pass rates are exact, else of 95 %.

    With E s <= sigma and E s^2 = sigma^2 (ddof 1), the lower end of the mean s and the
    root of the upper end of the mean s^2 hold sigma between them. Both are intervals
    over prompts, each prompt's mean over measurements counting once.
    """
    if rows[-1]["pass_rate"] is not None:
        factor = float(values(rows, "phase", "rate_factor")[-1])
        return factor, factor
    sigma = values(rows, "sigma")  # [N, P]
    means = [finite_mean(x, 0) for x in (sigma, sigma**2)]
    means = [x[np.isfinite(x)] for x in means]
    low, high = mean_interval(means[0])[1], mean_interval(means[1])[2]
    return 8 / 3 * max(low, 0.0), 8 / 3 * high**0.5


KINDS = {
    "near-orthogonal": "prompts hardly affect each other, so a scale per prompt acts "
    "on that prompt alone",
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


_KINDS_OF = sampled_kind, exact_kind


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

    def at(row: Row) -> str:
        return f"at step {row['step']} " if len(shown) > 1 else ""

    finite = np.flatnonzero(np.isfinite(figures).all(1))
    if not len(finite):
        return "Interference among prompts is unknown: no cosine could be estimated."
    kinds = [kind_of(row) for row in shown]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    meaning = "The intervals allow more than one reading."
    if common in KINDS:
        meaning = f"Where it is {common}, in theory {KINDS[common]}."
    text = (
        f"Interference among prompts: {_counted(shown, kind_of)}"
        f"{'' if exact else ' (by 95 % intervals)'}. {meaning} The {source} cosines: "
    )
    text += "; ".join(
        f"{at(shown[i])}mean {figures[i, 1]:+.2f}, std "
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
        f"{int((high < 0).sum())} (2.5 % of measurements each, were it 0)."
    )


def _others_text(rows: Rows) -> str:
    if not has_pass_rates(rows):
        return " Rewards are not in [0, 1], so no prompts are called hard."
    effect = effect_on_hard(rows)
    if effect is None:
        return " No measurement has a prompt with signal and a pass rate below 1/3."
    if effect.different < LEAST_PROMPTS:
        count = f"{effect.different} probe prompt{'s' * (effect.different > 1)}"
        return (
            f" {count} with signal had a pass rate below 1/3: at least {LEAST_PROMPTS} "
            "are needed to say what the others' gradients do to them."
        )
    return (
        f" Prompts with a pass rate below 1/3 ({effect.prompts} over "
        f"{_measurements(effect.measurements)}) change by {effect.own:+.3g} through "
        f"their own {'sampled' if effect.band else 'exact'} gradient and by "
        f"{effect.others:+.3g} through the others' in a plain gradient step of length "
        "1, but for what gradients have in common: " + _direction_text(effect)
    )


def _direction_text(effect: Effect) -> str:
    said = {1: "helps them on average", -1: "hurts them on average"}
    said[0] = "is not shown to help or to hurt them"
    text = f"interference {said[effect.direction]}"
    if effect.band is None:
        return f"{text}, and hurts {_percent(effect.hurt)} of them."
    low, high = effect.band
    return (
        f"{text} (with random signs of the prompts' gradients, 95 % of the latter "
        f"would be between {low:+.3g} and {high:+.3g})."
    )


def _noise_text(rows: Rows) -> str:
    enough = [
        r for r in rows if signal_prompts(r["geometry"]["cosines"]) >= LEAST_PROMPTS
    ]
    if few := len(rows) - len(enough):
        text = f"At {few} of {_measurements(len(rows))} fewer than {LEAST_PROMPTS} "
        text += "prompts had signal, too few for any figure of cosines."
        return f"{text} {_noise_text(enough)}" if enough else text
    attenuation = values(rows, "geometry", "attenuation")
    finite = attenuation[np.isfinite(attenuation)]
    if not len(finite):
        return _hidden_text(rows)
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


def _hidden_text(rows: Rows) -> str:
    """Where no measurement tells a cosine: how little signal there is."""
    text = f"Sampling noise hides the cosines{_everywhere(rows)}"
    effective = rows[-1]["phase"].get("effective_prompts")
    if effective is None:
        return f"{text}."
    return (
        f"{text}: the gradients that stand out from it amount to {effective:.1f} of "
        f"{len(rows[-1]['sigma'])} prompts{'' if len(rows) == 1 else ' at the last'}, "
        "or less than a tenth of the squared norms is signal."
    )


def _label(row: Row) -> str:
    return row["phase"]["label"]


def _counted(rows: Rows, label_of: Callable[[Row], str]) -> str:
    """Counts of each label, such as "I at 3 of 5 measurements, unknown at 2"."""
    labels = [label_of(row) for row in rows]
    counts = sorted({x: labels.count(x) for x in labels}.items(), key=lambda x: -x[1])
    parts = [f"{label} at {n}" for label, n in counts]
    parts[0] += f" of {_measurements(len(rows))}"
    return ", ".join(parts)


def _everywhere(rows: Rows) -> str:
    return "" if len(rows) == 1 else f" at all of {_measurements(len(rows))}"


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
    "I / II / III: shares of draws from the distribution of the estimates in which the "
    "phase is certain; the intervals are their 2.5 and 97.5 percentiles, of the small "
    "fraction those of bounds for any distribution. Cosines are debiased; violating: "
    "share of pairs with a negative inner product, chi: largest eigenvalue of the raw "
    "cosines, both with sampling noise in them. Rank corr.: Spearman, |curvature| "
    "along the prompt's gradient against sigma squared; noise alone gives sampled "
    "ones up to +.3. Features: mean cosine of hidden states."
)


def table(rows: Rows) -> list[list[str]]:
    """One line of HEADER's figures per row; "-" where a figure is missing."""
    return [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    phase, geometry, exact = row["phase"], row["geometry"], row["exact"]
    shares = np.asarray(phase["shares"], float)
    certain = " / ".join(f"{x:.2f}" for x in shares[np.isfinite(shares)])
    true = {"mean_abs": None, "std": None} if exact is None else exact["statistics"]
    return [
        str(row["step"]),
        phase["label"],
        certain or "-",
        *(
            f"{_number(phase[name])}\n{_interval(phase[f'{name}_interval'])}"
            for name in ("small_fraction", "std_cosine", "mean_cosine")
        ),
        "-" if exact is None else exact_label(row),
        _number(true["mean_abs"]),
        _number(true["std"]),
        _number(geometry["attenuation"]),
        _number(geometry["violating_fraction"]),
        _number(phase["rate_factor"]) if is_binary([row]) else "-",
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
