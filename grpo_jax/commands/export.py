"""`grpo-jax export RUN_DIR OUT_DIR [--step N] [--adapter] [--dtype bfloat16]`: write a
run's policy as a model that transformers loads; --adapter: its LoRA factors alone, as
PEFT reads them."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
from jax.typing import DTypeLike

from grpo_jax.commands._arguments import parse
from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import ADAPTER_CONFIG, base_name, is_adapter, load_tokenizer
from grpo_jax.models.lora import save_adapter
from grpo_jax.models.policy import Policy, merge_lora
from grpo_jax.models.pretrained import file_dtype, read_config, save_pretrained
from grpo_jax.models.rounding import Loss, check_loss, rounding_loss
from grpo_jax.records import as_type
from grpo_jax.runs.directory import read_facts
from grpo_jax.runs.recorded import run_config
from grpo_jax.runs.snapshots import load_policy, pick_step

DEFAULT_LOSS = 0.01  # of an update, where a dtype is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which policy is written, and where."""

    run_dir: str  # the run
    out_dir: str  # the model directory to write
    step: int | None = None  # one that the run kept; default: the newest
    adapter: bool = False  # only the LoRA factors
    # Of the files; default: as the files of the model that the run began with, but
    # float32 where factors are merged
    dtype: Literal["float32", "bfloat16"] | None = None
    # Largest share of a parameter's update that rounding may lose; default: 0.01 with
    # a --dtype, else any
    max_loss: float | None = None


def main(argv: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    options = parse(ExportOptions, argv, __doc__, positional=True)
    step = export(
        options.run_dir,
        options.out_dir,
        step=options.step,
        adapter=options.adapter,
        dtype=options.dtype,
        max_loss=options.max_loss,
    )
    print(f"step {step} of {options.run_dir} written to {options.out_dir}")
    return 0


def export(
    run_dir: Path | str,
    directory: Path | str,
    *,
    step: int | None = None,
    adapter: bool = False,
    dtype: DTypeLike | None = None,
    max_loss: float | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Writes a run's policy and tokenizer as a model directory; returns its step.

    Args:
        run_dir: The run.
        directory: The model directory to write.
        step: One of `saved_steps`; None: the newest.
        adapter: Write only the LoRA factors, as PEFT reads them.
        dtype: float32 or bfloat16, of the files; None: as the files of the model that
            the run began with (float32 for a new one, and where LoRA's factors are
            merged).
        max_loss: Largest relative loss of what the run learnt, over parameters and
            layers, that rounding may cause; None: 0.01 with a given `dtype`, else any.
        say: Gets a line about what rounding loses.

    Raises:
        ConfigError: the step was not saved, the run has no LoRA factors, or rounding
            would lose more than `max_loss`.
    """
    run_dir = Path(as_type(str, run_dir, "run_dir"))
    directory = Path(as_type(str, directory, "directory"))
    step, dtype = as_type(int | None, step, "step"), file_dtype(dtype)
    adapter = as_type(bool, adapter, "adapter")
    max_loss = as_type(float | None, max_loss, "max_loss")
    facts = read_facts(run_dir)
    step = pick_step(run_dir, step)
    if (directory / "checkpoints").exists() or directory.is_file():
        raise ConfigError(
            f"{directory} is a run or a file; export to a directory of its own."
        )
    _check_output(directory)
    if adapter and dtype is not None:
        raise ConfigError("dtype is of a whole model's files; leave it out.")
    policy = load_policy(run_dir, step)
    if adapter:
        base = _base_of(run_config(run_dir).pretrained)
        save_adapter(policy.params, policy.config, directory, base=base)
        return step
    policy = _rounded(policy, run_dir, dtype, max_loss, say)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    ends = facts.get("eos_ids")
    save_pretrained(policy, directory, tokenizer=tokenizer, eos_ids=ends)
    return step


def _check_output(directory: Path) -> None:
    """ConfigError for a directory of other files than a model's or an adapter's."""
    names = {p.name for p in directory.glob("*")} if directory.is_dir() else set()
    if names and not names & {"config.json", ADAPTER_CONFIG}:
        some = ", ".join(sorted(names)[:3])
        raise ConfigError(
            f"{directory} holds files that are no model's ({some}); export to a new "
            "directory, or to one of an earlier export."
        )


def _base_of(pretrained: str | None) -> str | None:
    """The base model that a run's adapter names: a Hub name, or a directory that leads
    there from anywhere; None: a model that `export --step 0` writes."""
    if pretrained is None:
        return None
    if Path(pretrained).is_dir() and is_adapter(Path(pretrained)):
        pretrained = base_name(Path(pretrained))
    return os.path.abspath(pretrained) if Path(pretrained).is_dir() else pretrained


def _rounded(
    policy: Policy,
    run_dir: Path,
    dtype: str | None,
    max_loss: float | None,
    say: Callable[[str], None],
) -> Policy:
    """The policy to write, LoRA's factors merged, and a line of what rounding loses."""
    merged, base = merge_lora(policy), policy.frozen
    stored = _stored_dtype(run_dir)
    if dtype is None and stored == "float32":
        return merged
    start = load_policy(run_dir, 0).params if base is None else base
    target = dtype or stored
    loss = rounding_loss(merged.params, start, target)
    if dtype is None and base is not None:
        say(
            f"written in float32: in bfloat16, as the base model is, {loss} would be "
            "lost; --adapter writes the factors alone and leaves the base as it is."
        )
        return merged
    if dtype is not None and max_loss is None:
        max_loss = DEFAULT_LOSS
    if max_loss is not None:
        check_loss(loss, target, max_loss)
    if loss.share:
        say(_loss_text(loss, target, chosen=dtype is not None))
    return merged.replace(jax.tree.map(lambda x: x.astype(target), merged.params))


def _stored_dtype(run_dir: Path) -> str:
    """Of the model's files that the run began with; float32 for a new model."""
    pretrained = run_config(run_dir).pretrained
    return "float32" if pretrained is None else read_config(pretrained).dtype


def _loss_text(loss: Loss, dtype: str, *, chosen: bool) -> str:
    text = f"rounding to {dtype} loses {loss} at most"
    if chosen:
        return f"{text}."
    return (
        f"written in {dtype}, as the model that the run began with: {text}; "
        "--dtype float32 writes all of it."
    )
