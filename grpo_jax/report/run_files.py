"""The files of a run directory that the report reads."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.runs.directory import read_config_dict, read_notes
from grpo_jax.runs.lines import read_lines


class RunFiles(NamedTuple):
    """Contents of one run directory; every file is a list of its lines."""

    name: str  # in titles and legends
    directory: Path
    config: dict[str, Any]
    versions: dict[str, str]
    note: str  # a remark of the task on its held-out figures; may be empty
    formula: str  # of the objective; empty in a run of an older version
    rate_from: str  # where its learning rate comes from, in words
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    measurements: list[dict[str, Any]]  # instrument.jsonl
    counterfactuals: list[dict[str, Any]]  # counterfactual.jsonl, finite gradients

    @property
    def has_other_rewards(self) -> bool:
        """Whether the mean reward of an evaluation is another figure than the pass rate
        by the same samples."""
        return any(
            row[f"eval/{name}_reward"]
            != row.get(f"eval/{name}_sampled", row[f"eval/{name}_pass_rate"])
            for row in self.metrics
            for name in ("train", "heldout")
            if f"eval/{name}_reward" in row
        )

    def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [N], values [N]) of a metric, where it was written and finite."""
        rows = [(r["step"], r[field]) for r in self.metrics if r.get(field) is not None]
        return np.asarray([r[0] for r in rows]), np.asarray([r[1] for r in rows], float)


def number(value: Any, pattern: str = ".3f") -> str:
    """The number, or "-" in place of None and NaN."""
    missing = value is None or not np.isfinite(value)
    return "-" if missing else format(value, pattern)


def read_run(directory: Path) -> RunFiles:
    """Reads a run directory.

    Raises:
        ConfigError: the directory holds no run, or no step of it was written.
    """
    directory = Path(directory)
    config = read_config_dict(directory)
    metrics = read_lines(directory / "metrics.jsonl")
    if not metrics:
        raise ConfigError(f"{directory} has no metrics yet; nothing to report.")
    versions, note, formula, rate_from = read_notes(directory)
    return RunFiles(
        directory.name or str(directory),
        directory,
        config,
        versions,
        note,
        formula,
        rate_from,
        metrics,
        read_lines(directory / "samples.jsonl"),
        read_lines(directory / "instrument.jsonl"),
        [
            row
            for row in read_lines(directory / "counterfactual.jsonl")
            if None not in row["norm_ratio"]  # null: a gradient was not finite
        ],
    )
