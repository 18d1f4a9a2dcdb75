"""`Rollouts`: what sampling hands to scoring and to the update."""

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:  # the reader imports this module
    from grpo_jax.rollouts.forms import RowForm


class Rollouts(NamedTuple):
    """Prompts and their groups of completions; the group is an axis.

    Attributes:
        prompts: [P, L] int32 token ids, padded on either side.
        prompt_mask: [P, L] int32, 1 on the prompt's tokens.
        completions: [P, G, T] int32, pad_id after each completion's end.
        completion_mask: [P, G, T] int32, 1 on sampled tokens, EOS included. 0 after a
            completion's end, and on tokens within it that somebody else wrote, such as
            a tool: these are attended to, and are in no loss and no statistic.
        behaviour_logprobs: [P, G, T] float32, of the distribution each token was drawn
            from (temperature and any truncation included); 0 on other tokens, NaN on
            sampled ones where the sampler's log-prob is not known.
        rewards: [P, G] float32, NaN where a reward is missing; None before scoring. A
            group of fewer than G samples has places without tokens, their rewards NaN.
        solving: [P, G] float32, what each reward holds for solving the prompt: the
            first reward's weight where that one is 1 or more, else 0. None: not told
            apart.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    completion_mask: jax.Array
    behaviour_logprobs: jax.Array
    rewards: jax.Array | None = None
    solving: jax.Array | None = None

    @property
    def scored_rewards(self) -> jax.Array:
        """The rewards, [P, G] float32.

        Raises:
            ValueError: the rollouts are not scored yet.
        """
        if self.rewards is None:
            raise ValueError(
                "rollouts must have rewards [P, G], got none; score them first, or "
                "set them with rollouts._replace(rewards=...)."
            )
        return self.rewards

    @property
    def sampler_logprobs(self) -> jax.Array:
        """The behaviour log-probs, [P, G, T] float32, of every sampled token.

        Raises:
            ValueError: some are not known (where that can be seen: not while traced).
        """
        logprobs = self.behaviour_logprobs
        if isinstance(logprobs, Tracer):
            return logprobs
        unknown = int((jnp.isnan(logprobs) & (self.completion_mask > 0)).sum())
        if unknown:
            raise ValueError(
                f"behaviour_logprobs must be known here, got NaN for {unknown} of "
                f"{int(self.completion_mask.sum())} sampled tokens; rows need the "
                "sampler's log-probs, or take those of the policy that sampled: "
                "gj.with_logprobs(policy, rollouts)."
            )
        return logprobs

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        form: "str | RowForm" = "rows",
        step: int | None = None,
        group_size: int | None = None,
        pad_to: int | None = None,
    ) -> "Rollouts":
        """Rollouts that somebody else sampled and scored, from rows in memory.

        Rows of one prompt (the same tokens, or the form's `group`) are its group.
        Groups may differ in size: the places of a smaller one that hold no sample are
        spread evenly, so that any equal parts of a group hold about as many samples.

        Args:
            rows: Mappings of fields; a row is one completion, or one prompt with lists.
            tokenizer: A transformers tokenizer; None where all rows have token ids.
            form: What the fields are called: a key of `ROW_FORMS`, or a `RowForm`.
            step: Which one, of rows of several steps.
            group_size: G, where it must be larger than the largest group.
            pad_to: Lengths are padded to a multiple of it; None: to one of at most 8
                lengths per doubling, so that few programs are compiled.

        Returns:
            Rollouts with rewards; prompts padded on the left, completions on the right.
            `behaviour_logprobs` are NaN where the rows have none.

        Raises:
            ConfigError: a row is not as the form says (it is named), several steps are
                to be chosen from, or no group has two samples with a reward.
        """
        from grpo_jax.rollouts.reading import one_step
        from grpo_jax.rollouts.sources import as_rows

        return one_step(as_rows(rows), tokenizer, form, step, group_size, pad_to)

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        tokenizer: Any,
        *,
        form: "str | RowForm" = "rows",
        step: int | None = None,
        group_size: int | None = None,
        pad_to: int | None = None,
    ) -> "Rollouts":
        """`from_rows` of a file of one JSON object a line, or of all in a directory;
        errors name the line."""
        from grpo_jax.rollouts.reading import one_step
        from grpo_jax.rollouts.sources import file_rows

        return one_step(
            file_rows(path, ".jsonl"), tokenizer, form, step, group_size, pad_to
        )

    @classmethod
    def from_parquet(
        cls,
        path: str | PathLike[str],
        tokenizer: Any,
        *,
        form: "str | RowForm" = "rows",
        step: int | None = None,
        group_size: int | None = None,
        pad_to: int | None = None,
    ) -> "Rollouts":
        """`from_rows` of a parquet file, or of all in a directory; needs pyarrow."""
        from grpo_jax.rollouts.reading import one_step
        from grpo_jax.rollouts.sources import file_rows

        return one_step(
            file_rows(path, ".parquet"), tokenizer, form, step, group_size, pad_to
        )

    @classmethod
    def by_step(
        cls,
        source: str | PathLike[str] | Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        form: "str | RowForm" = "rows",
        group_size: int | None = None,
        pad_to: int | None = None,
    ) -> "Iterator[tuple[int | None, Rollouts]]":
        """(step, rollouts) of every step in rows, a file, or a directory of files.

        The files of a directory are read one after the other, in the order of the
        numbers in their names. The step is the row's, else the one that the path names
        (`step_12/`), else None. Arguments and errors as in `from_rows`.
        """
        from grpo_jax.rollouts.reading import each_step

        for one in each_step(source, tokenizer, form, group_size, pad_to):
            yield one.step, one.rollouts

    def to_rows(self) -> list[dict[str, Any]]:
        """One row of token ids for each completion, as `from_rows` reads them.

        Of fields that JSON can hold: group, prompt, completion, and reward (None where
        missing), logprobs and mask where the rollouts have them.
        """
        from grpo_jax.rollouts.reading import rows_of

        return rows_of(self)


def completion_lengths(completion_mask: Any) -> Any:
    """[P, G] tokens of each completion up to its last sampled one.

    Args:
        completion_mask: [P, G, T], of NumPy or jax.
    """
    places = np.arange(1, completion_mask.shape[-1] + 1)
    return (completion_mask.astype(bool) * places).max(-1)
