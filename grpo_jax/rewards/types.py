"""A question with its gold answer, and a reward by name."""

import dataclasses
import reprlib
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A question and its gold answer.

    Attributes:
        prompt: What is asked, without any template; the last user turn.
        answer: The gold answer as the task's rewards compare it.
        solution: The worked text a model may imitate; "" where there is only the
            answer.
        tags: What evaluation is broken down by, as ("level", "3") pairs.
        context: (role, content) of the turns before the prompt.
    """

    prompt: str
    answer: str
    solution: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    context: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward by name, computed in a worker process that can be killed.

    The names are those of `verifiers.VERIFIERS`; "module:function" is a user's
    function(example, completion) -> float. The rewards of a task are added up with
    their weights; a completion solves its prompt where the first of them is 1 or more.
    """

    name: str
    weight: float = 1.0
    options: tuple[tuple[str, float], ...] = ()


def reward_number(value: Any) -> float:
    """What a reward function returned, as a float.

    Raises:
        TypeError: it is no number, such as None or text that spells one.
    """
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"it returned {reprlib.repr(value)}, not a number")
    return float(value)
