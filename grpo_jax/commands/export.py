"""`grpo-jax export`: a run's policy as a model directory."""

from pathlib import Path

from grpo_jax.errors import ConfigError
from grpo_jax.models.hub import load_tokenizer
from grpo_jax.models.lora import save_adapter
from grpo_jax.models.pretrained import save_pretrained
from grpo_jax.runs.directory import read_facts
from grpo_jax.runs.snapshots import load_policy, pick_step


def export(
    run_dir: Path | str,
    directory: Path | str,
    *,
    step: int | None = None,
    adapter: bool = False,
) -> int:
    """Writes a run's policy and tokenizer as a model directory; returns its step.

    Args:
        step: One of `saved_steps`; None: the newest.
        adapter: Write the LoRA factors alone, as PEFT reads them.

    Raises:
        ConfigError: no such step, or no factors to write.
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
