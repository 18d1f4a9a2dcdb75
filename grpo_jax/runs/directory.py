"""A run's directory: which run it belongs to, and whether it may be continued."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.errors import ConfigError
from grpo_jax.runs.config import TrainConfig
from grpo_jax.runs.config_files import differences, to_dict, with_paths
from grpo_jax.runs.files import replace_text
from grpo_jax.runs.lines import read_lines

# Settings that may change on resume: those that the maths does not depend on. `steps`
# may as long as neither the learning rate nor the weights depend on it. Paths of data
# and of the pretrained model may change, their fingerprints may not.
FREE_ON_RESUME = (
    "run_dir", "resume", "checkpoint.every", "checkpoint.minutes", "checkpoint.keep",
    "log.", "task.path", "task.heldout_path", "pretrained", "scoring.workers",
    "scoring.environment", "mesh", "reference_memory",
)  # fmt: skip

_SHOWN = 40  # characters around the place where two prompts differ
# Entry of the fact `prompts` -> what a change of it is called.
_ASKED = {
    "texts": "the rows' prompts",
    "template": "the template",
    "system": "the system prompt",
    "arguments": "the template's arguments",
    "control_tokens": "task.control_tokens",
    "vocabulary": "the tokenizer's vocabulary",
}


def claim(config: TrainConfig, facts: dict[str, Any]) -> Path:
    """The directory this run may write to, created; a new run's config is in it.

    Args:
        config: The run's config.
        facts: What config.json has besides: `note`, what the report should say of the
            task; `eos_ids`; and `data`, `prompts` and `base`, fingerprints of the
            task's prompts and answers, of the prompts as encoded, and of the pretrained
            model.

    Raises:
        ConfigError: it holds another run, or this one and `resume` is not set, or there
            is nothing to resume; nothing was changed.
    """
    directory = Path(config.run_dir) if config.run_dir else _default_directory(config)
    started = (directory / "config.json").exists()
    if config.resume and not started:
        raise ConfigError(
            f"nothing to resume in {directory}: it holds no config.json; "
            "check --run-dir, or leave --resume out to start there."
        )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run_dir must be a directory, {directory} is a file.")
    if config.resume:
        _check_same_run(directory, config, facts)
    elif directory.exists() and any(directory.iterdir()):
        raise _occupied(directory, config, started)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the run directory {directory}: {error.strerror}."
        ) from error
    if not config.resume:
        record(directory, config, facts)
    return directory


def _occupied(directory: Path, config: TrainConfig, started: bool) -> ConfigError:
    """The error for a new run in a directory that is not empty."""
    if not started:
        return ConfigError(
            f"{directory} is not empty and holds no run; choose another --run-dir."
        )
    changed = _changed(read_config_dict(directory), config)
    if changed:
        return ConfigError(
            f"{directory} holds a run with another config ({'; '.join(changed)}); "
            "choose another --run-dir."
        )
    return ConfigError(
        f"{directory} holds this run already; continue it with --resume, or choose "
        "another --run-dir."
    )


def _check_same_run(
    directory: Path, config: TrainConfig, facts: dict[str, Any]
) -> None:
    """ConfigError where a setting that the maths depends on, the data, the prompts or
    the pretrained model changed since the run began."""
    check_same_config(directory, config)
    if what := changed_facts(read_facts(directory), facts):
        raise ConfigError(
            f"cannot resume {directory}: {what} changed since it began; restore it, or "
            "give another --run-dir."
        )


def check_same_config(directory: Path, config: TrainConfig) -> None:
    """Raises ConfigError where a setting that the maths depends on changed since the
    run began."""
    scheduled = config.weights.power_end is not None
    constant = config.optimizer.schedule == "constant" and not scheduled
    free = (*FREE_ON_RESUME, "steps:") if constant else FREE_ON_RESUME
    old = read_facts(directory)
    if old.get("task_in_code"):  # by another name its data must still be the same
        free = (*free, "task.name:")
    changed = [
        row for row in _changed(old["config"], config) if not row.startswith(free)
    ]
    if changed:
        raise ConfigError(
            f"cannot resume {directory} with another config "
            f"({'; '.join(changed)}); give the same one, or another --run-dir."
        )


def check_task_is_found(facts: dict[str, Any], name: str, again: str) -> None:
    """ConfigError where a run's task was given in code.

    Args:
        facts: Of `read_facts`.
        name: Of the task that is asked for now.
        again: How the task is given again.
    """
    if facts.get("task_in_code") and name == facts["config"]["task"]["name"]:
        raise ConfigError(
            f"the run's task {name} was given in code and cannot be found by its name; "
            f"{again}."
        )


def changed_facts(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Which of the data, the prompts as encoded and the pretrained model changed."""
    prompts = differing_prompts(old.get("prompts"), new.get("prompts"))
    if prompts is not None:
        return f"what the model is asked ({prompts})"
    for name, what in (("data", "the task's data"), ("base", "the pretrained model")):
        if old.get(name, new[name]) != new[name]:
            return what
    return None


def differing_prompts(
    old: dict[str, Any] | None, new: dict[str, Any] | None
) -> str | None:
    """How the prompts differ, in words; None: they do not, or one side is not known.

    Args:
        old, new: Of `asked_facts` in rollouts; a run of an older version has none.
    """
    if old is None or new is None or old["encoded"] == new["encoded"]:
        return None
    named = [text for name, text in _ASKED.items() if old.get(name) != new[name]]
    parts = [f"changed: {', '.join(named)}"] if named else []
    before, now = old.get("first", ""), new["first"]
    if before != now:
        at = next(
            (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
            min(len(before), len(now)),
        )
        window = slice(max(0, at - _SHOWN), at + _SHOWN)
        parts.append(f"the first prompt had {before[window]!r}, now {now[window]!r}")
    return "; ".join(parts) or "the same texts have other tokens"


def record(directory: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Writes config.json; for a resumed run, once it is certain to go on."""
    origin = None
    if config.resume:  # modules are still found where it began
        begun = read_facts(directory)
        origin = began_in(directory, begun)
        first = ("learning_rate_from",)  # what the first start said of it holds
        facts = facts | {name: begun[name] for name in first if name in begun}
        config = with_paths(config, _absolute)
    content = {
        "config": to_dict(config),
        "versions": versions(),
        "began_in": str(origin or Path.cwd()),
    }
    content |= facts
    replace_text(directory / "config.json", json.dumps(content, indent=2))


def began_in(run_dir: Path, facts: dict[str, Any]) -> Path | None:
    """The directory in which a run began; None where that is not known."""
    if "began_in" in facts:
        return Path(facts["began_in"])
    named = facts["config"].get("run_dir")
    tail = Path(named).parts if named else ("runs", run_dir.name)
    parts = run_dir.absolute().parts
    if Path(*tail).is_absolute() or ".." in tail or parts[-len(tail) :] != tail:
        return None
    return Path(*parts[: -len(tail)])


def _absolute(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def _default_directory(config: TrainConfig) -> Path:
    """runs/TASK-OBJECTIVE-seedN, numbered if taken."""
    stem = f"{config.task.name}-{config.objective.name}-seed{config.seed}"
    stem = stem.replace(":", ".")  # of objects of the user's own
    directory, number = Path("runs") / stem, 1
    while directory.exists():
        number += 1
        directory = Path("runs") / f"{stem}-{number}"
    return directory


def _changed(old: dict[str, Any], config: TrainConfig) -> list[str]:
    """Differences from the config that a run began with, as text."""
    rows = differences(_with_defaults(old, to_dict(TrainConfig())), to_dict(config))
    return [row for row in rows if not row.startswith(("run_dir", "resume"))]


def _with_defaults(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A config with defaults in place of fields that it was written before."""
    filled = {
        name: _with_defaults(old[name], value)
        for name, value in defaults.items()
        if isinstance(value, dict) and isinstance(old.get(name), dict)
    }
    return {**defaults, **old, **filled}


def read_config_dict(directory: Path) -> dict[str, Any]:
    """The config a run was started with, as nested dicts.

    Raises:
        ConfigError: the directory holds no run.
    """
    return read_facts(directory)["config"]


def read_facts(directory: Path) -> dict[str, Any]:
    """The content of config.json: config, versions, and the facts given to `claim`.

    What older runs did without recording it is filled in: how many prompts they
    measured, updates without a gradient, which they made, and float32 to compute in.

    Raises:
        ConfigError: the directory holds no run.
    """
    file = Path(directory) / "config.json"
    try:
        facts = json.loads(file.read_text())
        if not isinstance(facts["config"], dict):
            raise ValueError("its config is no mapping")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} holds no run: it has no config.json."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error}); it cannot be used.") from error
    config = facts["config"]
    if isinstance(config.get("instrument"), dict):
        config["instrument"] |= _measured(directory, config)
    if isinstance(config.get("optimizer"), dict):
        config["optimizer"].setdefault("skip_empty", False)
    if isinstance(config.get("model"), dict):
        config["model"].setdefault("compute_dtype", "float32")
    return facts


def _measured(directory: Path, config: dict[str, Any]) -> dict[str, int]:
    """What a run of an older version chose and did not record: the prompts of its
    measurements, or no measurements where it took steps without any."""
    wanted = config["instrument"]
    if wanted.get("prompts") is not None or not wanted.get("every", 1):
        return {}
    rows = read_lines(Path(directory) / "instrument.jsonl")
    if rows:
        return {"prompts": len(rows[0]["prompts"])}
    steps = read_lines(Path(directory) / "metrics.jsonl")
    return {"every": 0} if any(row.get("step", 0) > 0 for row in steps) else {}


class Notes(NamedTuple):
    """What a run recorded beside its config, for readers."""

    versions: dict[str, str]  # of packages
    note: str  # of the task
    formula: str  # of the objective
    learning_rate_from: str  # in words


def read_notes(directory: Path) -> Notes:
    """What is said of a run; "" for what an older one did not record."""
    facts = read_facts(directory)
    return Notes(
        facts.get("versions", {}),
        facts.get("note", ""),
        facts.get("formula", ""),
        facts.get("learning_rate_from", "as given"),
    )


def versions() -> dict[str, str]:
    """Versions of Python, the machine, and the packages that numbers depend on."""
    names = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            names[package] = "not installed"
    return names
