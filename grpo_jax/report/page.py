"""report.html: one self-contained file that says what a run did, or several beside each
other. Plots are inline SVG; nothing is fetched when it is opened."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.instrument.rows import ROW_FIELDS, THIRDS
from grpo_jax.objectives.presets import OBJECTIVES
from grpo_jax.report.instrument_figures import instrument_section
from grpo_jax.report.svg import COLOURS, svg_figure
from grpo_jax.runs.config_files import differences
from grpo_jax.runs.directory import read_config_dict, read_notes
from grpo_jax.runs.fields import FIELDS, PART
from grpo_jax.runs.lines import read_lines


class Run(NamedTuple):
    name: str
    directory: Path
    config: dict
    versions: dict
    note: str  # what the task says of its held-out figures
    metrics: list[dict]
    samples: list[dict]
    probes: list[dict]  # instrument.jsonl
    compared: list[dict]  # counterfactual.jsonl

    def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, where it was written and finite."""
        rows = [(r["step"], r[field]) for r in self.metrics if r.get(field) is not None]
        return np.asarray([r[0] for r in rows]), np.asarray([r[1] for r in rows], float)


def read_run(directory: Path) -> Run:
    """Raises ConfigError where the directory holds no run, or one without a step."""
    directory = Path(directory)
    config = read_config_dict(directory)
    metrics = read_lines(directory / "metrics.jsonl")
    if not metrics:
        raise ConfigError(f"{directory} has no metrics yet; nothing to report.")
    versions, note = read_notes(directory)
    return Run(
        directory.name or str(directory),
        directory,
        config,
        versions,
        note,
        metrics,
        read_lines(directory / "samples.jsonl"),
        read_lines(directory / "instrument.jsonl"),
        [
            row
            for row in read_lines(directory / "counterfactual.jsonl")
            if None not in row["norm_ratio"]  # gradients that were not finite
        ],
    )


def write_report(directories: Sequence[Path], output: Path) -> Path:
    """One HTML file about the runs in `directories`, overlaid where there are several.

    Raises:
        ConfigError: a directory holds no run.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [run._replace(name=str(run.directory)) for run in runs]
    import jinja2

    instrument = _instrument(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_PAGE).render(
        title=" and ".join(run.name for run in runs),
        runs=[_facts(run) for run in runs],
        instrument=instrument,
        beside_each_other=_beside_each_other(instrument),
        figures=[f for f in _figures(runs) if f is not None],
        compared=[(run.name, _comparison(run)) for run in runs if run.compared],
        samples=[(run.name, _last_samples(run)) for run in runs],
        differing=_config_differences(runs),
        configs=[(run.name, json.dumps(run.config, indent=1)) for run in runs],
        fields={"metrics.jsonl": FIELDS, "instrument.jsonl": ROW_FIELDS},
    )
    temporary = output.with_suffix(".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)
    return output


def _facts(run: Run) -> dict:
    """What the top of the page says of one run."""
    facts = {
        "name": run.name,
        "versions": run.versions,
        "steps": run.metrics[-1]["step"],
    }
    facts["asked"] = run.config["steps"]
    objective = run.config["objective"]["name"]
    facts["objective"] = objective
    weights = run.config.get("weights", {}).get("name", "objective")
    facts["weights"] = "" if weights == "objective" else f" with {weights} weights"
    facts["source"] = OBJECTIVES[objective].source if objective in OBJECTIVES else ""
    facts["task"] = run.config["task"]["name"]
    facts["rows"] = []
    for name, label in (("train", "trained prompts"), ("heldout", "held-out prompts")):
        rows = [r for r in run.metrics if f"eval/{name}_pass_rate" in r]
        if rows:
            facts["rows"].append((label, _rate(rows[0], name), _rate(rows[-1], name)))
    seconds = [
        run.series(f"time/{phase}_s")[1] for phase in ("sample", "score", "update")
    ]
    if all(len(s) for s in seconds):
        facts["phases"] = [
            (phase, f"{np.median(s):.3f}")
            for phase, s in zip(("sample", "score", "update"), seconds, strict=True)
        ]
    mismatch = run.series("mismatch/max_abs")[1]
    facts["mismatch"] = f"{mismatch.max():.1e}" if len(mismatch) else "none yet"
    missing = run.series("reward/missing")[1]
    facts["missing"] = int(missing.sum())
    facts["failed"] = int(run.series("reward/failed")[1].sum())
    facts["verdict"] = _verdict(run)
    return facts


def _rate(row, name):
    return (
        f"{row[f'eval/{name}_pass_rate']:.3f} "
        f"[{row[f'eval/{name}_low']:.3f}, {row[f'eval/{name}_high']:.3f}]"
    )


def _verdict(run: Run) -> list[str]:
    """Plain sentences on what happened, from the first and last evaluation."""
    rows = [r for r in run.metrics if "eval/heldout_pass_rate" in r]
    if len(rows) < 2:
        return ["Too few evaluations to say what changed."]
    sentences = []
    for name, label in (("train", "trained"), ("heldout", "held-out")):
        a, b = rows[0], rows[-1]
        before, after = a[f"eval/{name}_pass_rate"], b[f"eval/{name}_pass_rate"]
        apart = b[f"eval/{name}_low"] > a[f"eval/{name}_high"]
        below = b[f"eval/{name}_high"] < a[f"eval/{name}_low"]
        change = "rose" if apart else "fell" if below else "did not change measurably"
        sentences.append(
            f"The pass rate on {label} prompts {change}: {before:.3f} at step "
            f"{a['step']}, {after:.3f} at step {b['step']}."
        )
    return [*sentences, run.note] if run.note else sentences


def _instrument(runs):
    sections = [
        instrument_section(run.name if len(runs) > 1 else "", run.probes)
        for run in runs
    ]
    return [section for section in sections if section is not None]


def _beside_each_other(sections):
    """The runs' figures, one kind after another; None where one run has no such."""
    kinds = zip(*(section["figures"] for section in sections), strict=True)
    return [figure for kind in kinds if any(kind) for figure in kind]


def _config_differences(runs):
    first = runs[0]
    return [(run.name, differences(first.config, run.config)) for run in runs[1:]]


def _last_samples(run: Run) -> list[dict]:
    """The first and the last entry's prompts, completions counted by text."""
    if not run.samples:
        return []
    steps = sorted({row["step"] for row in run.samples})
    shown = []
    for row in run.samples:
        if row["step"] not in (steps[0], steps[-1]):
            continue
        counts = {}
        for text, reward in zip(row["completions"], row["rewards"], strict=True):
            counts[(text, reward)] = counts.get((text, reward), 0) + 1
        top = sorted(counts.items(), key=lambda item: -item[1])[:6]
        shown.append(row | {"top": [(t, r, n) for (t, r), n in top]})
    return shown


# ---- figures


def _figures(runs):
    return [
        _curves(
            runs,
            "Pass rate",
            ("eval/train", "eval/heldout"),
            "Mean pass rate of trained (full line) and held-out (dashed) prompts, with "
            "95 % intervals over prompts.",
        ),
        _lines(runs, "Within-prompt std", "group/std_mean", smooth=True),
        _lines(runs, "Informative groups", "group/informative", smooth=True, top=1.0),
        _lines(runs, "Reward", "reward/mean", smooth=True),
        *(
            _lines(runs, f"Reward {name.removeprefix(PART)}", name, smooth=True)
            for name in sorted({f for run in runs for row in run.metrics for f in row})
            if name.startswith(PART)
        ),
        _lines(runs, "Entropy", "entropy/sampled", smooth=True),
        _lines(runs, "KL to the start", "kl/mean", smooth=True),
        _lines(runs, "Sampler/trainer mismatch", "mismatch/max_abs", log=True),
        _phases(runs),
        *(_predicted_changes(run, len(runs) > 1) for run in runs if run.compared),
    ]


def _curves(runs, title, prefixes, caption):
    if not any(len(run.series(f"{p}_pass_rate")[0]) for run in runs for p in prefixes):
        return None

    def draw(axes):
        for run, colour in zip(runs, _colours(runs), strict=True):
            for prefix, style in zip(prefixes, ("-", "--"), strict=True):
                steps, values = run.series(f"{prefix}_pass_rate")
                label = prefix.split("/")[1] if len(runs) == 1 else None
                if len(runs) > 1 and style == "-":
                    label = run.name
                axes.plot(steps, values, style, color=colour, label=label)
                low, high = (
                    run.series(f"{prefix}_{end}")[1] for end in ("low", "high")
                )
                axes.fill_between(steps, low, high, color=colour, alpha=0.13, lw=0)
        axes.set(xlabel="step", ylabel="pass rate", ylim=(0, 1))

    return svg_figure(title, caption, draw)


def _lines(runs, title, field, *, smooth=False, log=False, top=None):
    if not any(len(run.series(field)[0]) for run in runs):
        return None

    def draw(axes):
        for run, colour in zip(runs, _colours(runs), strict=True):
            steps, values = run.series(field)
            label = run.name if len(runs) > 1 else None
            if smooth and len(values) >= 10:
                width = max(2, len(values) // 20)
                axes.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
                values = np.convolve(values, np.ones(width) / width, mode="valid")
                steps = steps[width - 1 :]
            axes.plot(steps, values, color=colour, label=label)
        axes.set(xlabel="step")
        if log:
            axes.set_yscale("log")
        elif top is not None:
            axes.set_ylim(0, top)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)

    meaning = FIELDS[f"{PART}NAME" if field.startswith(PART) else field]
    return svg_figure(title, meaning[0].upper() + meaning[1:] + ".", draw)


def _comparison(run: Run) -> list[dict]:
    """One row per weighting: means over the steps that were compared."""
    rows = []
    norms, cosines, updates = (
        np.asarray([r[key] for r in run.compared], float)
        for key in ("norm_ratio", "cosines", "update_cosines")
    )
    rates, changes = _groups_and_changes(run)
    for k, name in enumerate(run.compared[0]["weightings"]):
        third = [changes[k][(rates >= low) & (rates < high)] for _, low, high in THIRDS]
        rows.append(
            {
                "name": name,
                "norm": f"{np.nanmean(norms[:, k]):.2f}",
                "cosines": [f"{x:.3f}" for x in np.nanmean(cosines[:, k], 0)],
                "update": f"{np.nanmean(updates[:, k, 0]):.3f}",
                "change": [f"{np.nanmean(x):+.4f}" if len(x) else "-" for x in third],
                "total": f"{np.nanmean(changes[k]):+.4f}",
            }
        )
    return rows


def _groups_and_changes(run):
    """(group means [N], predicted changes [K, N]) of all compared steps' prompts."""
    rates = np.concatenate([np.asarray(r["group_mean"], float) for r in run.compared])
    changes = np.concatenate(
        [np.asarray(r["predicted_change"], float) for r in run.compared], axis=1
    )
    return rates, changes


def _predicted_changes(run, named):
    def draw(axes):
        rates, changes = _groups_and_changes(run)
        edges = np.linspace(0, 1, 6)
        place = np.clip(np.digitize(rates, edges) - 1, 0, 4)
        place = np.where(np.isnan(rates), -1, place)
        used = [b for b in range(5) if (place == b).any()]
        middle = (edges[:-1] + edges[1:]) / 2
        for k, name in enumerate(run.compared[0]["weightings"]):
            values = [np.nanmean(changes[k][place == b]) for b in used]
            own = name == "this run"
            colour = "#222" if own else COLOURS[(k - 1) % len(COLOURS)]
            style = {"lw": 3, "alpha": 0.3} if own else {"marker": "o", "ms": 3}
            axes.plot(middle[used], values, color=colour, label=name, **style)
        axes.axhline(0, color="#999", lw=0.8)
        axes.set(xlabel="pass rate of a prompt's group", ylabel="predicted change")
        axes.set_xlim(0, 1)

    title = "What other weightings would have done"
    caption = (
        "Predicted change of a prompt's expected reward under the update that the "
        "run's optimizer would have made of each weighting's gradient, by slope and "
        f"curvature along it; mean over {len(run.compared)} steps, in five bins."
    )
    return svg_figure(f"{title}: {run.name}" if named else title, caption, draw)


def _phases(runs):
    if not any(len(run.series("time/update_s")[0]) for run in runs):
        return None

    def draw(axes):
        shades = ("#2f5d8a", "#b9a44c", "#c0562f")
        for i, run in enumerate(runs):
            left = 0.0
            for phase, shade in zip(("sample", "score", "update"), shades, strict=True):
                values = run.series(f"time/{phase}_s")[1]
                width = float(np.median(values)) if len(values) else 0.0
                label = phase if i == 0 else None
                axes.barh(i, width, 0.5, left=left, color=shade, label=label)
                left += width
        axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=7)
        axes.set(xlabel="seconds a step (median)", ylim=(-0.6, len(runs) + 0.3))
        axes.legend(frameon=False, fontsize=7.5, ncols=3, loc="upper left")

    return svg_figure("Time per phase", "Median seconds of each phase of a step.", draw)


def _colours(runs):
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


_PAGE = """{% macro grid(figures, columns) %}
<div class="figures"{% if columns %} style="grid-template-columns:
 repeat({{ columns }}, 1fr)"{% endif %}>
{% for figure in figures %}
<figure>{% if figure %}<h3>{{ figure.title }}</h3>{{ figure.svg | safe }}
<figcaption>{{ figure.caption }}</figcaption>{% endif %}</figure>
{% endfor %}
</div>
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto;
  padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .15em .9em .15em 0;
  text-align: left; vertical-align: top; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr));
  gap: 1.2em 2em; } figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: .88em; } figure h3 { margin: 0; font-size: 1em; }
code, pre { font: 13px ui-monospace, monospace; } pre { background: #f6f6f4;
  padding: .8em; overflow-x: auto; } .muted { color: #666; }
.figures { margin: 1em 0; } summary { cursor: pointer; }
.looks { overflow-x: auto; font-size: .78em; line-height: 1.3; }
.looks td { white-space: pre; } .looks td, .looks th { padding-right: .7em; }
.right { color: #2c7a3f; } .wrong { color: #a8442a; } p { margin: .4em 0; }
</style></head><body>
<h1>{{ title }}</h1>
{% for run in runs %}
<section>
{% if runs | length > 1 %}<h2>{{ run.name }}</h2>{% endif %}
{% for sentence in run.verdict %}<p>{{ sentence }}</p>{% endfor %}
<table>
<tr><th></th><th>first</th><th>last</th></tr>
{% for label, first, last in run.rows %}
<tr><td>pass rate, {{ label }} [95 %]</td><td>{{ first }}</td><td>{{ last }}</td></tr>
{% endfor %}
</table>
<p class="muted">{{ run.objective }}{{ run.weights }} on {{ run.task }},
step {{ run.steps }} of {{ run.asked }}; {% if run.phases %}median seconds a step:
{% for phase, seconds in run.phases %}
{{ phase }} {{ seconds }}{{ ", " if not loop.last }}
{%- endfor %}; {% endif %}
largest sampler/trainer log-prob mismatch {{ run.mismatch }} nats;
rewards missing: {{ run.missing }}
{%- if run.failed %}, checks that hung or died: {{ run.failed }}{% endif %}.
{{ run.source }}.</p>
</section>
{% endfor %}
{% for name, rows in differing %}
<p><b>{{ name }}</b> differs from {{ runs[0].name }} in:
{% if rows %}{% for row in rows %}<code>{{ row }}</code>{{ "; " if not loop.last }}
{%- endfor %}{% else %}nothing{% endif %}.</p>
{% endfor %}
{% if instrument %}
<h2>Why and when normalisation helps</h2>
<p class="muted">Dividing a prompt's advantages by their std sigma scales its gradient
by 1 / sigma. That pays where the prompt's curvature falls with sigma&sup2;, so that a
longer step is safe, and as far as prompts' gradients do not interfere. Measured here on
a fixed set of probe prompts.</p>
{% for section in instrument %}
{% if section.name %}<h3>{{ section.name }}</h3>{% endif %}
{% for sentence in section.reading %}<p>{{ sentence }}</p>{% endfor %}
{% endfor %}
{{ grid(beside_each_other, instrument | length if instrument | length in (2, 3)) }}
{% for section in instrument %}
<details{% if section.rows | length <= 25 %} open{% endif %}><summary>Every look
{{- " of " ~ section.name if section.name }}</summary>
<div class="looks"><table>
<tr>{% for name in section.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}
<tr>{% for x in row %}<td>{{ x }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="muted">{{ section.table_note }}</p></details>
{% endfor %}
{% endif %}
<h2>Curves</h2>
{{ grid(figures) }}
{% for name, rows in compared %}
<h2>Other weightings{{ " in " ~ name if compared | length > 1 }}</h2>
<p class="muted">The same rollouts under other prompt weights, means over the steps
compared: the gradient's norm relative to reinforce, the cosines between gradients, the
cosine of the update that the run's optimizer (its memory included) would have made to
the run's own, and the change of a prompt's expected reward which that update predicts:
over all prompts, and over hard (group's pass rate below 1/3), middle and easy (2/3 and
above) ones. Measured on the samples that made the gradients: each prompt's own noise
counts as gain, under every weighting alike.</p>
<table>
<tr><th></th><th>norm</th>{% for row in rows %}<th>cos to {{ row.name }}</th>
{% endfor %}<th>cos of update to this run's</th><th>change</th><th>hard</th>
<th>middle</th><th>easy</th></tr>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td>{{ row.norm }}</td>
{% for x in row.cosines %}<td>{{ x }}</td>{% endfor %}
<td>{{ row["update"] }}</td><td>{{ row.total }}</td>
{% for x in row.change %}<td>{{ x }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
<h2>Samples</h2>
{% for name, rows in samples %}
{% if samples | length > 1 %}<h3>{{ name }}</h3>{% endif %}
{% if not rows %}<p class="muted">None were logged.</p>{% endif %}
<table>
{% for row in rows %}
<tr><td>step {{ row.step }}</td><td><code>{{ row.prompt }}</code></td>
<td>{% for text, reward, count in row.top %}
<span class="{{ 'right' if reward and reward > 0 else 'wrong' }}">
<code>{{ text }}</code> x{{ count }}</span>{{ ",&ensp;" | safe if not loop.last }}
{% endfor %}</td><td class="muted">answer <code>{{ row.answer }}</code></td></tr>
{% endfor %}
</table>
{% endfor %}
<h2>Config and versions</h2>
{% for run in runs %}
<p class="muted">{% for package, version in run.versions.items() %}{{ package }}
 {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
{% endfor %}
{% for name, config in configs %}
<details><summary>config of {{ name }}</summary><pre>{{ config }}</pre></details>
{% endfor %}
{% for file, meanings in fields.items() %}
<details><summary>fields of {{ file }}</summary><table>
{% for field, meaning in meanings.items() %}
<tr><td><code>{{ field }}</code></td><td>{{ meaning }}</td></tr>{% endfor %}
</table></details>
{% endfor %}
</body></html>
"""
