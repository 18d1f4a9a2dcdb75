"""`grpo-jax export RUN_DIR OUT_DIR [--step N] [--adapter]`: write a run's policy as a
model that transformers loads; --adapter: its LoRA factors alone, as PEFT reads them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import load_tokenizer
from grpo_jax.models.lora import save_adapter
from grpo_jax.models.pretrained import save_pretrained
from grpo_jax.runs.directory import read_facts
from grpo_jax.runs.snapshots import load_policy, pick_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which policy is written, and where."""

    run_dir: str  # the run
    out_dir: str  # the model directory to write
    step: int | None = None  # one that the run kept; default: the newest
    adapter: bool = False  # only the LoRA factors


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse(ExportOptions, argv, __doc__, positional=True)
    step = export(
        options.run_dir, options.out_dir, step=options.step, adapter=options.adapter
    )
    print(f"step {step} of {options.run_dir} written to {options.out_dir}")
    return 0


def export(
    run_dir: Path | str,
    directory: Path | str,
    *,
    step: int | None = None,
    adapter: bool = False,
) -> int:
    """Writes a run's policy and tokenizer as a model directory; returns its step.

    Args:
        run_dir: The run.
        directory: The model directory to write.
        step: One of `saved_steps`; None: the newest.
        adapter: Write only the LoRA factors, as PEFT reads them.

    Raises:
        ConfigError: the step was not saved, or the run has no LoRA factors.
    """
    run_dir, directory = Path(run_dir), Path(directory)
    facts = read_facts(run_dir)
    step = pick_step(run_dir, step)
    if (directory / "checkpoints").exists() or directory.is_file():
        raise ConfigError(
            f"{directory} is a run or a file; export to a directory of its own."
        )
    policy = load_policy(run_dir, step)
    if adapter:
        base = facts["config"].get("pretrained")  # else `export --step 0` writes it
        save_adapter(policy.params, policy.config, directory, base=base)
        return step
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    ends = facts.get("eos_ids")
    save_pretrained(policy, directory, tokenizer=tokenizer, eos_ids=ends)
    return step
