"""Tasks by name."""

from grpo_jax.errors import ConfigError, unknown_name
from grpo_jax.tasks.chains import make_chains
from grpo_jax.tasks.gsm8k_expressions import make_gsm8k_expressions
from grpo_jax.tasks.types import Example, Task, WarmStart, exact_match

TASKS = ("chains", "gsm8k-expressions")

__all__ = ["TASKS", "Example", "Task", "WarmStart", "exact_match", "load_task"]


def load_task(
    name: str,
    *,
    path: str | None = None,
    train_prompts: int | None = None,
    heldout_prompts: int | None = None,
    seed: int = 0,
) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no such task, a path where none is read, or data that does not fit.
    """
    sizes = dict(
        train_prompts=train_prompts, heldout_prompts=heldout_prompts, seed=seed
    )
    if name == "chains":
        if path is not None:
            raise ConfigError(
                f"task chains is generated and reads no file, got task.path={path!r}; "
                "leave it out."
            )
        return make_chains(**sizes)
    if name == "gsm8k-expressions":
        return make_gsm8k_expressions(path=path, **sizes)
    raise unknown_name("task", name, TASKS)
