"""What a setting may be: ranges of its numbers, which `check_fields` reads off the
annotation, and the user's own objects beside names."""

from typing import Annotated

from grpo_jax.errors import Bound, at_least, positive
from grpo_jax.records import Own

Natural = Annotated[int, at_least(0)]
Count = Annotated[int, at_least(1)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, positive()]
Decay = Annotated[float, Bound("be in [0, 1)", lambda x: 0 <= x < 1)]
GroupSize = Annotated[int, at_least(2, "; a group of one has no baseline")]
ProbePrompts = Annotated[int, at_least(2, "; one prompt has no angle to another")]
PolicyTemperature = Annotated[
    float, positive("; it is part of the policy that is trained")
]
SampleTemperature = Annotated[float, positive("; greedy decoding is --greedy")]
Ddof = Annotated[int, Bound("be 0 or 1", lambda x: x in (0, 1))]
Seed = Annotated[int, at_least(0), Bound("be below 2**63", lambda x: x < 2**63)]


def own(what: str, argument: str) -> Own:
    """Of an object that `train` takes as an argument."""
    return Own(
        f"{what} of your own goes into gj.train(config, {argument}=...), or is named "
        "as module:name"
    )
