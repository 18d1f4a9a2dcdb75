"""The report's section on the instrument, from synthetic rows."""

import json

import numpy as np
import pytest

from grpo_jax.instrument.rows import exact_label, is_binary, usable
from grpo_jax.report import prompt_figures
from grpo_jax.report.cosine_figures import smooth
from grpo_jax.report.instrument_figures import FIGURES, instrument_section
from grpo_jax.report.instrument_text import kind, reading, sampled_kind, table
from grpo_jax.runs.lines import without_nan

NAN = float("nan")


def statistics(mean=0.05, std=0.12, small=0.8):
    return {
        "mean": mean,
        "std": std,
        "mean_abs": abs(mean) + std / 2,
        "positive_fraction": 0.6,
        "small_fraction": small,
    }


def made_row(step, *, prompts=6, exact=True, binary=True, label="II", update=True):
    """One measurement as instrument.jsonl has it, pass rates rising with the step."""
    rng = np.random.default_rng(step)
    p = np.clip(np.linspace(0.02, 0.7, prompts) + step / 100, 0, 0.98)
    mean = np.round(p * 8) / 8
    mean[0] = 0.0  # a tied group
    std = np.sqrt(mean * (1 - mean)) * (1.0 if binary else 0.4)
    signal = std > 0

    def some(scale=1.0):
        return np.where(signal, scale * rng.normal(size=prompts), NAN).tolist()

    cosines = np.eye(prompts) + 0.1 * rng.normal(size=(prompts, prompts))
    cosines[~signal] = cosines[:, ~signal] = NAN
    labelled = label != "unknown"
    return {
        "step": step,
        "phase": {
            "label": label,
            "shares": [0.01, 0.96, 0.0] if labelled else [NAN, NAN, NAN],
            "small_fraction": 0.8 if labelled else NAN,
            "small_fraction_interval": [0.1, 0.9] if labelled else [NAN, NAN],
            "std_cosine": 0.08 if labelled else NAN,
            "std_cosine_interval": [0.0, 0.2] if labelled else [NAN, NAN],
            "mean_cosine": 0.03 if labelled else NAN,
            "mean_cosine_interval": [-0.1, 0.1] if labelled else [NAN, NAN],
            "mean_sigma": 0.3,
            "rate_factor": 0.8,
            "prompts": int(signal.sum()),
            "effective_prompts": 4.5 if labelled else 1.2,
        },
        "prompts": list(range(prompts)),
        "group_size": 8,
        "directions": None,
        "group_mean": mean.tolist(),
        "group_std": std.tolist(),
        "sigma": (std * np.sqrt(8 / 7)).tolist(),
        "pass_rate": p.tolist() if exact else None,
        "curvature": some(10),
        "halves": [2 if x else 0 for x in signal],
        "spread": np.where(signal, 500.0, NAN).tolist(),
        "slope": some(),
        "geometry": {
            "cosines": cosines.tolist(),
            "squared_norms": np.where(signal, 1.0, NAN).tolist(),
            "raw_squared_norms": np.where(signal, 2.0, 0.0).tolist(),
            "attenuation": 0.4 if labelled else NAN,
            "violating_fraction": 0.45,
            "chi": 1.7,
        },
        "null": statistics(0.0, 0.07),
        "features": {"raw": statistics(0.8), "centred": statistics(-0.1)},
        "weightings": {
            name: {"own": np.abs(some()).tolist(), "others": some()}
            for name in ("reinforce", "std")
        },
        "exact": {
            "cosines": (np.eye(prompts) * 0.9 + 0.1).tolist(),
            "statistics": statistics(),
            "chi": 2.0,
            "norms": [1.0] * prompts,
            "curvature": some(10),
            "slope": some(),
        }
        if exact
        else None,
        "update": {
            "predicted": some(0.01),
            "realised": some(0.01),
            "exact_slope": some(0.01) if exact else [NAN] * prompts,
            "exact_curvature": some(0.01) if exact else [NAN] * prompts,
        }
        if update
        else None,
    }


def made_rows(count=5, **changes):
    """Rows as read from a file, where NaN is null."""
    rows = [made_row(10 * i, update=i < count - 1, **changes) for i in range(count)]
    return json.loads(json.dumps([without_nan(row) for row in rows]))


def emptied(value):
    """The row with null in place of every measured number."""
    if isinstance(value, dict):
        kept = ("step", "label", "group_size")
        return {k: x if k in kept else emptied(x) for k, x in value.items()}
    if isinstance(value, list):
        return [emptied(x) for x in value]
    return None if isinstance(value, float) else value


def titles(section):
    return [figure["title"] for figure in section["figures"] if figure]


def test_exact_rows_make_every_figure():
    section = instrument_section("", made_rows())
    assert len(titles(section)) == len(FIGURES)
    assert all("<svg" in figure["svg"] for figure in section["figures"])
    assert len(section["rows"]) == 5
    assert {len(row) for row in section["rows"]} == {len(section["header"])}


def test_with_several_runs_every_title_names_its_run():
    section = instrument_section("mine", made_rows())
    assert all(title.endswith(": mine") for title in titles(section))


def test_without_exact_rows_only_figures_of_them_are_missing():
    section = instrument_section("", made_rows(2, exact=False))
    assert len(titles(section)) == len(FIGURES) - 1
    assert "Pass rate against std" not in titles(section)
    assert "exact" not in " ".join(section["reading"])


OVER_THE_RUN = {
    "Phases", "The statistics that decide the phase", "Probe prompts' pass rates",
    "Probe prompts' sigma",
}  # fmt: skip


def test_figures_over_the_run_take_two_measurements():
    section = instrument_section("", [made_row(0, update=False)])
    assert "Predicted and realised change" not in titles(section)
    assert not OVER_THE_RUN & set(titles(section))
    assert "at 1 of 1 measurement" in section["reading"][0]
    refused = section["reading"][-1]
    assert refused.startswith("Not drawn, for too little to show: Probe prompts' pass")
    assert "Phases (needs 2 measurements, has 1)" in refused
    assert set(titles(instrument_section("", made_rows(2)))) >= OVER_THE_RUN


# One prompt of each row is tied: 5 prompts make 4 with signal.
def test_figures_over_prompts_take_enough_of_them():
    few = {
        5: {"Probe prompts' pass rates", "Probe prompts' sigma"},
        4: {"Cosines by phase", "Pass rate against std"},
    }
    everything = set(titles(instrument_section("", made_rows())))
    for prompts, missing in few.items():
        section = instrument_section("", made_rows(prompts=prompts))
        assert missing <= everything - set(titles(section))
        assert all(title in section["reading"][-1] for title in missing)
        above = instrument_section("", made_rows(prompts=prompts + 1))
        assert missing <= set(titles(above))
    assert (
        "(needs 6 probe prompts, has 5)"
        in (instrument_section("", made_rows(prompts=5))["reading"][-1])
    )


def test_scatters_take_five_dots():
    title = "Predicted and realised change"
    row = made_row(0, prompts=5)  # 4 changes
    section = instrument_section("", [row, made_row(5, prompts=5, update=False)])
    assert f"{title} (needs 5 changes of a prompt, has 4)" in (section["reading"][-1])
    again = made_row(5, prompts=5)
    assert title in titles(instrument_section("", [row, again]))
    title = "Curvature against variance"
    row = made_row(0, prompts=5, exact=False)
    assert title not in titles(instrument_section("", [row]))
    again = made_row(5, prompts=5, exact=False)
    assert title in titles(instrument_section("", [row, again]))


def test_a_bar_averages_four_prompts_with_signal():
    title = "What each weighting would have done"
    row = made_row(0, prompts=3)  # 2 with signal, in different thirds
    assert title not in titles(instrument_section("", [row]))
    rows = [made_row(step, prompts=3) for step in range(4)]
    assert title in titles(instrument_section("", rows))


# 3 prompts with signal, whatever the row says of its cosines.
@pytest.mark.parametrize("older", [False, True])
def test_cosines_of_too_few_prompts_are_no_figures(older):
    rows = made_rows(prompts=4)
    for row in rows:
        row["phase"].pop("effective_prompts") if older else None
    section = instrument_section("", rows)
    for line in section["rows"]:
        assert line[1:6] == ["unknown", "-", "-\n", "-\n", "-\n"]
        assert line[9:11] == ["-", "-"] and line[12] == "-"  # noise, violating, chi
    text = " ".join(section["reading"])
    assert "phase is unknown at all of 5 measurements" in text
    assert "At 5 of 5 measurements fewer than 4 prompts had signal" in text
    line = instrument_section("", made_rows(prompts=5))["rows"][0]
    assert "-" not in (line[9], line[10], line[12]) and line[1] == "II"


# An exact gradient has no noise, and yet three cosines are no distribution.
def test_exact_cosines_of_too_few_prompts_are_no_figures():
    rows = made_rows(prompts=6)
    for row in rows:
        for i in range(3):
            row["exact"]["cosines"][i][i] = None
    section = instrument_section("", rows)
    assert {tuple(line[6:9]) for line in section["rows"]} == {("unknown", "-", "-")}
    assert "exact cosines: at step" not in " ".join(section["reading"])


def test_three_prompts_say_nothing():
    section = instrument_section("", made_rows(prompts=3))
    assert section["reading"][0].startswith("3 prompts were measured: at least 4")
    assert len(section["reading"]) == 2
    assert len(instrument_section("", made_rows(prompts=4))["reading"]) == 5


def test_rank_correlations_take_five_prompts():
    lines = [table(usable([made_row(0, prompts=p)]))[0] for p in (5, 6)]
    assert lines[0][13] == "-" != lines[1][13]  # 4 with signal, and 5


@pytest.mark.parametrize("exact", [True, False])
def test_rows_without_any_finite_number_are_said_to_be_unknown(exact):
    rows = made_rows(4, label="unknown", exact=exact)
    section = instrument_section("", [emptied(row) for row in rows])
    assert titles(section) == []
    answer, phase, rate, interference, noise, _ = section["reading"]
    assert answer.startswith("Whether normalisation helps on these prompts is not told")
    assert phase.startswith("The phase is unknown at all of 4 measurements")
    assert rate.startswith("C is unknown")
    assert "Interference among prompts is unknown" in interference
    assert "At 4 of 4 measurements fewer than 4 prompts had signal" in noise


def test_rows_of_an_older_version_are_left_out():
    old = {"step": 0, "pass_rate": [0.5], "group_std": [0.5], "inner": [[1.0]]}
    assert instrument_section("", [old]) is None
    assert instrument_section("", []) is None
    assert usable([old, made_row(10)])[0]["step"] == 10


# Rows from before `effective_prompts` are read, their labels not taken at their word.
def test_labels_of_an_older_version_are_said_to_be_less_sure():
    rows = made_rows(2)
    rows.append(made_rows(1, label="unknown")[0] | {"step": 30})
    for row in rows:
        del row["phase"]["effective_prompts"]
    rows[0]["phase"]["shares"] = [0.2, 0.5, 0.3]
    rows[2]["phase"]["small_fraction"] = 0.0
    read = usable(rows)
    assert read[2]["phase"]["small_fraction"] is None
    text = reading(read)[0]
    assert "II at 2 of 3 measurements" in text
    assert "Not so the labels of 2 measurements by an earlier version" in text
    assert instrument_section("", rows)["rows"][0][2] == "0.20 / 0.50 / 0.30"


# An unknown phase is not unknown cosines: the figures and their intervals stay.
def test_a_row_without_a_sure_label_keeps_its_figures():
    row = made_row(0)
    row["phase"] |= {"label": "unknown", "shares": [0.0, 0.6, 0.3]}
    line = table(usable([row]))[0]
    assert line[1:4] == ["unknown", "0.00 / 0.60 / 0.30", "0.80\n[0.10, 0.90]"]
    again = row | {"step": 5}
    assert "Phases" in titles(instrument_section("", [row, again]))


def test_no_bound_is_drawn_for_rewards_that_are_not_binary():
    rows = made_rows(1, exact=False, binary=False)
    assert is_binary(made_rows()) and not is_binary(rows)
    captions = " ".join(
        f["caption"] for f in instrument_section("", rows)["figures"] if f
    )
    assert "no bound in sigma²" in captions
    assert "C says nothing" in reading(usable(rows))[1]


def test_sentences_follow_the_numbers():
    rows = usable(made_rows(prompts=8))
    phase, rate, interference, noise = reading(rows)
    assert "sampled cosines: II at 5 of 5 measurements" in phase
    assert "A label holds in 95 % of draws" in phase and "earlier version" not in phase
    # Exact std 0.12 with 80 % below 0.1 is III, so the two never agree.
    assert "III at 5 of 5 measurements; both agree at 0 of 5 measurements" in phase
    assert (
        "0.800 at the last measurement, by exact pass rates: below 1" in rate
        and "no more" in rate
    )
    assert "of mixed sign at 5 of 5 measurements" in interference
    assert "mean +0.05, std 0.12, 80 % of them below 0.1 in size" in interference
    assert "above 0 at 0 of 5 measurements, below 0 at 0" in interference
    assert "shrinks raw cosines to 40 % of the true ones" in noise


@pytest.mark.parametrize(
    ("small", "mean", "std", "expected"),
    [
        (0.95, 0.0, 0.05, "near-orthogonal"),
        (0.2, 0.5, 0.1, "aligned"),
        (0.2, -0.5, 0.1, "opposed"),
        (0.5, 0.05, 0.2, "of mixed sign"),
    ],
)
def test_kind(small, mean, std, expected):
    assert kind(small, mean, std) == expected


def test_sampled_cosines_are_of_a_kind_only_where_their_intervals_agree():
    phase = made_row(0)["phase"]

    def kind_of(small, std, mean):
        changes = {"small_fraction": small, "std_cosine": std, "mean_cosine": mean}
        changes = {f"{name}_interval": x for name, x in changes.items()}
        return sampled_kind({"phase": phase | changes})

    assert kind_of((0.95, 1), (0, 0.1), (-0.1, 0.1)) == "near-orthogonal"
    assert kind_of((0, 0.5), (0, 0.1), (0.2, 0.4)) == "aligned"
    assert kind_of((0, 0.5), (0, 0.1), (-0.4, -0.2)) == "opposed"
    assert kind_of((0, 0.5), (0.2, 0.3), (-0.1, 0.1)) == "of mixed sign"
    assert kind_of((0, 1), (0.2, 0.3), (-0.1, 0.1)) == "unknown"
    assert kind_of((0, 0.5), (0, 0.1), (0.2, 1.4)) == "unknown"
    assert kind_of((0, 0.5), (0, 0.3), (0.2, 0.4)) == "unknown"


def test_exact_label_by_the_thresholds():
    row = made_row(0)
    labels = []
    for small, std in ((0.95, 0.2), (0.8, 0.05), (0.8, 0.2), (None, None)):
        row["exact"]["statistics"] = statistics(std=std, small=small) if std else {
            "small_fraction": None, "std": None,
        }  # fmt: skip
        labels.append(exact_label(row))
    assert labels == ["I", "II", "III", "unknown"]


def test_table_gives_intervals():
    line = table(usable([made_row(0)]))[0]
    assert line[3] == "0.80\n[0.10, 0.90]" and line[2] == "0.01 / 0.96 / 0.00"


def test_the_smooth_curve_keeps_a_line_and_turns_a_jump_into_a_slope():
    x = np.array([0.0, 5, 20, 30, 35, 60])
    places, line = smooth(x, 2 - 0.1 * x)
    np.testing.assert_allclose(line, 2 - 0.1 * places)
    assert (places[0], places[-1], len(places)) == (0, 60, 101)
    places, step = smooth(x, np.array([0, 0, 0, 1, 1, np.nan]))
    assert places[-1] == 35 and np.all(np.abs(np.diff(step)) < 0.1)
    assert all(len(z) == 0 for z in smooth(x, np.array([0, 0, 1, 1, np.nan, np.nan])))


@pytest.mark.parametrize("count", [5, 6, 7, 8, 12, 20])
def test_unrelated_pairs_seldom_have_a_larger_rank_correlation(count):
    """Spearman's, of which every order is as likely: of 20,000, 3 standard errors."""
    orders = np.argsort(np.random.default_rng(0).normal(size=(20_000, count)), 1)
    centred = orders - (count - 1) / 2
    correlations = centred @ centred[0] / (centred[0] @ centred[0])
    outside = (np.abs(correlations) > prompt_figures.by_chance(count)).mean()
    assert outside < 0.05 + 3 * (0.05 * 0.95 / 20_000) ** 0.5
