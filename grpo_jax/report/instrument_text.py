"""What the rows of instrument.jsonl say in words and in a table, no claim without its
number, and the helpers that its figures read them with."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.diagnostics.phases import PHASES, THRESHOLDS
from grpo_jax.instrument.rows import (
    curvature_correlations,
    exact_label,
    first_order,
    is_binary,
    pass_rates,
    values,
    with_exact,
)

WIDE = 0.5  # an interval of a share that says little
SURE = 0.95  # share of bootstrap samples


# ---- sentences


def reading(rows: Sequence[dict]) -> list[str]:
    """What usable rows allow to be said of the run, in plain sentences."""
    return [_phase_text(rows), _rate_text(rows), _interference_text(rows)] + [
        _noise_text(rows)
    ]


def _phase_text(rows):
    known = [row for row in rows if row["phase"]["label"] in PHASES]
    if not known:
        text = (
            f"No phase can be told at any of {_looks(len(rows))}: fewer than two "
            "prompts with signal, or hardly any signal in them."
        )
    else:
        text = f"The phase, by sampled cosines: {_counted(rows, _label)}. "
        shares = np.nan_to_num(values(known, "phase", "shares")).max(1)
        low, high = values(known, "phase", "small_fraction_interval").T
        sure, wide = int((shares >= SURE).sum()), int((high - low > WIDE).sum())
        text += (
            f"Of the {_looks(len(known))} with a label, {sure} "
            f"{'holds' if sure == 1 else 'hold'} one phase in {_percent(SURE)} of "
            f"bootstrap samples (median look: {_percent(np.median(shares))}), and "
            f"{wide} {'leaves' if wide == 1 else 'leave'} the fraction of small "
            f"cosines open by more than {WIDE:g}"
        )
        text += ": the label says little there." if wide else "."
    exact = with_exact(rows)
    if exact:
        text += (
            f" The exact cosines of the same prompts say {_counted(exact, exact_label)}"
        )
        both = [row for row in exact if row["phase"]["label"] in PHASES]
        agree = sum(exact_label(row) == row["phase"]["label"] for row in both)
        text += f"; both agree at {agree} of {_looks(len(both))}." if both else "."
    return text


def _rate_text(rows):
    factor = values(rows, "phase", "rate_factor")[-1]
    if not np.isfinite(factor):
        return "C cannot be told: no prompt has two rewards."
    text = f"C = 8/3 of the mean sigma so far is {factor:.2f} at the last look: "
    if not is_binary(rows):
        return text + "no statement, since the theorem is for rewards 0 and 1."
    if factor < 1:
        text += "below 1, so the upper bound for std-normalisation is the lower one."
    else:
        text += "not below 1, so the theorem claims no gain from std-normalisation."
    return text + (
        " That compares two upper bounds, for orthogonal prompts, and no more."
    )


KINDS = {
    "near-orthogonal": "prompts hardly touch each other, so a scale per prompt acts "
    "on that prompt alone, as the theory assumes",
    "aligned": "prompts mostly move together, so that what one prompt's scale "
    "changes the others also do, and normalisation is nearly redundant",
    "opposed": "prompts mostly undo each other's steps, and the ones with the largest "
    "weight win",
    "of mixed sign": "some prompts are hurt by others, and where these are the hard "
    "ones normalisation is worth more, not less",
}


def kind(small: float, mean: float, std: float) -> str:
    """Which of KINDS cosines of that small fraction, mean and std are."""
    if not np.isfinite([small, mean, std]).all():
        return "unknown"
    if small >= THRESHOLDS.small_fraction:
        return "near-orthogonal"
    if abs(mean) > std:
        return "aligned" if mean > 0 else "opposed"
    return "of mixed sign"


def sampled_kind(row: dict) -> str:
    """`kind` of a look's debiased cosines where their 95 % intervals leave no other."""
    low, high = values([row], "phase", "mean_cosine_interval")[0]
    small = values([row], "phase", "small_fraction_interval")[0]
    std = values([row], "phase", "std_cosine_interval")[0]
    if not np.isfinite([low, high, *small, *std]).all():
        return "unknown"
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    farthest = max(abs(low), abs(high))
    if farthest >= 1:  # as far as a cosine can go: the debiasing has failed
        return "unknown"
    if small[0] >= THRESHOLDS.small_fraction:
        return "near-orthogonal"
    if small[1] >= THRESHOLDS.small_fraction:
        return "unknown"
    if nearest > std[1]:
        return "aligned" if low > 0 else "opposed"
    return "of mixed sign" if std[0] >= farthest else "unknown"


def exact_kind(row: dict) -> str:
    found = row["exact"]["statistics"]
    names = ("small_fraction", "mean", "std")
    return kind(*np.asarray([found[name] for name in names], float))


def _interference_text(rows):
    exact = with_exact(rows)
    shown, source, path = rows, "sampled (debiased)", ("phase",)
    names, kind_of = ("small_fraction", "mean_cosine", "std_cosine"), sampled_kind
    if exact:
        shown, source, path = exact, "exact", ("exact", "statistics")
        names, kind_of = ("small_fraction", "mean", "std"), exact_kind
    figures = np.stack([values(shown, *path, name) for name in names], 1)
    there = np.isfinite(figures).all(1)
    if not there.any():
        return "Of interference among prompts nothing can be said: no cosine is known."
    kinds = [kind_of(row) for row in shown]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    text = f"Interference among prompts: {_counted(shown, kind_of)}. "
    meaning = KINDS.get(common, "the intervals leave more than one reading")
    text += f"Where it is {common}, {meaning}. The {source} cosines: "
    known = [(shown[i]["step"], *figures[i]) for i in np.flatnonzero(there)]
    text += "; ".join(
        f"at step {step} mean {mean:+.2f}, std {std:.2f}, {_percent(small)} of them "
        "below 0.1 in size"
        for step, small, mean, std in dict.fromkeys([known[0], known[-1]])
    )
    text += ". "
    low, high = values(rows, "phase", "mean_cosine_interval").T
    told = int((np.isfinite(low) & np.isfinite(high)).sum())
    if told:
        text += (
            f"The 95 % interval over prompts of the sampled mean cosine is above 0 at "
            f"{int((low > 0).sum())} of {_looks(told)}, below 0 at "
            f"{int((high < 0).sum())}."
        )
    return text + _others_text(rows)


def _others_text(rows):
    own, others = first_order(rows, "reinforce")
    hard = np.isfinite(others) & (np.stack([pass_rates(row) for row in rows]) < 1 / 3)
    if not hard.any():
        return " No prompt with signal has a pass rate below 1/3 at any look."
    mean = others[hard].mean()
    return (
        f" Prompts with a pass rate below 1/3 ({hard.sum()} over all looks) gain "
        f"{own[hard].mean():+.3g} of their own and {mean:+.3g} through the others in "
        "a plain gradient step of length 1: interference "
        f"{'helps' if mean > 0 else 'hurts'} them on average, and hurts "
        f"{_percent((others[hard] < 0).mean())} of them."
    )


def _noise_text(rows):
    left = values(rows, "geometry", "attenuation")
    told = left[np.isfinite(left)]
    if not len(told):
        return (
            "Sampling noise hides the cosines at every look: less than a tenth of the "
            "squared gradient norms is signal."
        )
    text = (
        f"Sampling noise leaves {_percent(np.median(told))} of a true cosine in a raw "
        f"one at the median look ({_percent(told.min())} to {_percent(told.max())}"
    )
    text += (
        f"; at {len(left) - len(told)} of {_looks(len(left))} less than a tenth, where "
        "nothing is said)."
        if len(told) < len(left)
        else ")."
    )
    exact = with_exact(rows)
    if exact:
        sampled = values(exact, "phase", "std_cosine")
        true = values(exact, "exact", "statistics", "std")
        both = np.isfinite(sampled) & np.isfinite(true)
        if both.any():
            text += (
                f" Without it the cosines' std comes out as "
                f"{np.median(sampled[both]):.3f} (median); the exact one is "
                f"{np.median(true[both]):.3f}."
            )
    return text


def _label(row):
    return row["phase"]["label"]


def _counted(rows, label_of):
    """ "I at 3 of 5 looks, unknown at 2": how often each label, most often first."""
    labels = [label_of(row) for row in rows]
    counts = sorted({x: labels.count(x) for x in labels}.items(), key=lambda x: -x[1])
    parts = [f"{label} at {n}" for label, n in counts]
    parts[0] += f" of {_looks(len(rows))}"
    return ", ".join(parts)


def _looks(n):
    return "1 look" if n == 1 else f"{n} looks"


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
    "with sampling noise in them. Rank corr.: Spearman, |curvature| along the own "
    "gradient against sigma squared. Features: mean cosine of hidden states."
)


def table(rows: Sequence[dict]) -> list[list[str]]:
    """A line of HEADER's figures per look; "-" for what is not known."""
    return [_line(row) for row in rows]


def _line(row):
    phase, geometry, exact = row["phase"], row["geometry"], row["exact"]
    shares = (
        "-"
        if phase["label"] not in PHASES
        else " / ".join(f"{x:.2f}" for x in phase["shares"])
    )
    true = {"mean_abs": None, "std": None} if exact is None else exact["statistics"]
    return [
        str(row["step"]),
        phase["label"],
        shares,
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


def _number(x):
    x = float(np.asarray(x, float))
    return f"{round(x, 2) + 0.0:.2f}" if np.isfinite(x) else "-"


def _percent(share):
    return f"{100 * share:.0f} %"


def _interval(interval):
    low, high = (_number(x) for x in interval)
    return "" if "-" in (low, high) else f"[{low}, {high}]"
