"""The jsonl files of a run: written as it goes, complete again after a resume."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from grpo_jax.parallel.processes import Processes
from grpo_jax.rewards.types import Example
from grpo_jax.runs.lines import (
    JsonLines,
    NoLines,
    keep_until,
    read_lines,
    rewrite,
    to_numbers,
)
from grpo_jax.runs.sinks import Sinks
from grpo_jax.training.collector import Collected
from grpo_jax.training.console import Console, show

FILES = ("metrics", "samples", "counterfactual", "instrument")


class RowMaker(NamedTuple):
    """Makes the rows of metrics.jsonl."""

    schedule: optax.Schedule | None  # None: an optimizer of the user's own has it
    compiles: Callable[[], int]  # programs compiled so far

    def __call__(
        self, step: int, metrics: dict[str, Any], host: dict[str, Any]
    ) -> dict[str, Any]:
        """The row of a step, of metrics on the device and on the host."""
        row = {"step": step} | to_numbers(metrics) | host
        if step and self.schedule is not None:
            applied = row["update/applied"]  # the rate is that of the last one
            rate = self.schedule(max(0, applied - 1))
            row["learning_rate"] = float(np.asarray(rate))
        return row | {"compiles": self.compiles()}


class Journal:
    """Writes a run's jsonl files in process 0; in the others every call does nothing.

    A step's row of metrics.jsonl is kept when its update is made and written by
    `flush`: while the device samples the next step, before a checkpoint, at the end.
    Opening the files drops the rows after the step of the checkpoint, which the resumed
    run writes again, and adds the rows that could not be written when it was saved.

    Args:
        directory: The run's directory.
        processes: The processes of the run.
        console: Shows the rows.
        make_row: Makes the rows of metrics.jsonl.
        step: The step of the checkpoint; 0 at the start.
        unwritten: By file, rows that the checkpoint kept.
        tell: Gets each row of metrics.jsonl once it is written.
        sinks: Get it too, and what `complete` adds to one; closed with the journal.

    Attributes:
        last_row: The newest row of metrics.jsonl made by this process; {} before.
    """

    def __init__(
        self,
        directory: Path,
        processes: Processes,
        console: Console,
        make_row: RowMaker,
        *,
        step: int,
        unwritten: dict[str, list[dict]],
        tell: Callable[[dict[str, Any]], object] = lambda row: None,
        sinks: Sinks | None = None,
    ):
        self._directory, self._processes = directory, processes
        self._console, self._make_row, self._tell = console, make_row, tell
        self._sinks = sinks
        self._pending: tuple[int, dict, dict] | None = None
        self._shown = 0  # the step whose line was printed before its row was written
        self.last_row: dict[str, Any] = {}
        self._files: dict[str, JsonLines | NoLines] = {}
        for name in FILES:
            # At step 0 every file starts anew. instrument.jsonl drops the checkpoint's
            # step too: its row is written only after the following update, so the
            # probe prompts are measured again.
            last = step - 1 if name == "instrument" else step or -1
            rows = [r for r in unwritten.get(name, []) if r["step"] <= last]
            self._files[name] = self._open(name, last, rows)

    def _open(
        self, name: str, last: int, unwritten: Sequence[dict]
    ) -> JsonLines | NoLines:
        if not self._processes.is_writer:
            return NoLines()
        path, file = self._path(name), None
        with self._processes.writing():
            if path.exists():
                keep_until(path, last)
            file = JsonLines(path)
        if file is None:
            return NoLines()  # all processes end at the next exchange
        # An earlier resume from the same checkpoint may have written them.
        present = read_lines(path) if unwritten else []
        for row in unwritten:
            if row not in present:
                with self._processes.writing():
                    file.write(row)
        return file

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def keep(self, step: int, metrics: dict[str, Any], host: dict[str, Any]) -> None:
        """Keeps a step's row for `flush`, in place of one that was kept before.

        Args:
            step: As metrics.jsonl counts.
            metrics: Scalars still on the device; `flush` copies them.
            host: Numbers on the host.
        """
        self._pending = step, metrics, host

    def show(self) -> None:
        """Prints the line of the step that was kept: something slow comes before its
        row is written."""
        if self._pending is None:
            return
        step, metrics, host = self._pending
        self._console.step(step, self._make_row(step, metrics, host))
        self._shown = step

    def flush(self) -> None:
        """Writes the row of metrics.jsonl that was kept, if any."""
        if self._pending is None:
            return
        (step, metrics, host), self._pending = self._pending, None
        row = self._make_row(step, metrics, host)
        self._line("metrics", row)
        self.last_row = row
        if step and step != self._shown:
            self._console.step(step, row)
        if "eval/heldout_pass_rate" in row:
            self._console.say(f"step {step}: {evaluated_text(row)}")
        if self._processes.is_writer:
            self._tell(row)
            self._hand_on(row)

    def complete(self, step: int, late: dict[str, Any]) -> None:
        """Adds to the newest row what a stop left out of it.

        Args:
            step: The row's; nothing happens if the newest row is of another step.
            late: Numbers that were due at that step.
        """
        if not self._processes.is_writer:
            return
        rows = read_lines(self._path("metrics"))
        if not rows or rows[-1]["step"] != step:
            return
        missing = {name: x for name, x in late.items() if name not in rows[-1]}
        if not missing:
            return
        rows[-1] |= missing
        with self._processes.writing():
            rewrite(self._path("metrics"), rows)
            file = JsonLines(self._path("metrics"))  # of the new file
            self._files["metrics"].close()
            self._files["metrics"] = file
        self._hand_on({"step": step} | missing)

    def samples(
        self,
        step: int,
        collected: Collected,
        examples: Sequence[Example],
        max_prompts: int,
    ) -> None:
        """Entries of samples.jsonl: completions that this process scored.

        Args:
            step: As metrics.jsonl counts.
            collected: [P, G] completions with texts and rewards.
            examples: The trained examples.
            max_prompts: Entries at most.
        """
        rewards = np.asarray(collected.rollouts.scored_rewards)
        texts = collected.scored.texts
        for p in np.flatnonzero(collected.owned.any(1))[:max_prompts].tolist():
            example = examples[int(collected.indices[p])]
            owned = np.flatnonzero(collected.owned[p])
            values = [float(r) for r in rewards[p][owned]]
            row = {
                "step": step,
                "prompt": example.prompt,
                "answer": example.answer,
                "completions": [texts[p][g] for g in owned],
                "rewards": [None if np.isnan(r) else r for r in values],
            }
            self._line("samples", row)

    def counterfactual(self, row: dict[str, Any]) -> None:
        """A row of counterfactual.jsonl."""
        self._line("counterfactual", row)

    def measurement(self, row: dict[str, Any]) -> None:
        """A row of instrument.jsonl."""
        self._line("instrument", row)

    def unwritten(self) -> dict[str, list[dict]]:
        """By file, the rows that the writing process could not write; on all."""
        return self._processes.first(
            {name: file.unwritten for name, file in self._files.items()}
        )

    def last_metrics(self) -> dict[str, Any]:
        """The last row of metrics.jsonl as it is on disk, on all processes."""
        rows = read_lines(self._path("metrics"))
        return self._processes.first((rows or [{}])[-1])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._sinks is not None:
            self._sinks.close()

    def _hand_on(self, row: dict[str, Any]) -> None:
        if self._sinks is not None:
            self._sinks.log(row)

    def _line(self, name: str, row: dict[str, Any]) -> None:
        with self._processes.writing():
            self._files[name].write(row)


def evaluated_text(row: dict[str, Any]) -> str:
    """The pass rates of a row, and the mean reward where it is another figure."""
    rate, reward = row["eval/heldout_pass_rate"], row.get("eval/heldout_reward")
    text = (
        f"pass rate {show(row['eval/train_pass_rate'])} on trained prompts, "
        f"{show(rate)} on held-out ones"
    )
    sampled = row.get("eval/heldout_sampled", rate)
    if reward is not None and reward != sampled and not math.isnan(reward):
        text += f", whose mean reward is {show(reward)}"
    return text
