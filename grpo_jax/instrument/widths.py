"""What a measurement will be able to tell: how wide the std's interval is to be.

How wide depends on what nobody knows before measuring: the cosines, and how far
gradients stand out from sampling noise. So the figures hold under one of two
assumptions, both of SmolLM2-135M on task ladder before training (LoRA), and for prompts
with pass rates from 1/8 to 7/8; others have less signal. They are simulated, gradients
known, by experiments/interval_widths.py: the interval is a jackknife over prompts, and
its width has no formula.
"""

import bisect
import math
from collections.abc import Sequence

# What prompts are assumed to be -> samples of a prompt at which half of its gradient's
# squared norm is signal.
ASSUMED = {"a mix of skills": 10, "one skill": 30}
PROMPTS = (5, 8, 12, 16, 24, 32, 64, 128, 256)
GROUP_SIZES = (8, 16, 32, 64)
SELDOM = 0.5  # share of measurements below which figures are not to be expected

# fmt: off
# [GROUP_SIZES, PROMPTS] shares of measurements that tell a std at all, in percent.
_TOLD = {
    "a mix of skills": (
        (4, 27, 80, 97, 99, 100, 100, 100, 100),
        (46, 99, 100, 100, 100, 100, 100, 100, 100),
        (89, 100, 100, 100, 100, 100, 100, 100, 100),
        (99, 100, 100, 100, 100, 100, 100, 100, 100),
    ),
    "one skill": (
        (0, 4, 16, 17, 25, 23, 3, 3, 0),
        (11, 31, 45, 57, 72, 73, 72, 81, 89),
        (34, 86, 96, 97, 98, 100, 100, 100, 100),
        (81, 98, 100, 100, 100, 100, 100, 100, 100),
    ),
}
# [GROUP_SIZES, PROMPTS] half widths of the 95 % interval where it does, in thousandths.
_HALF = {
    "a mix of skills": (
        (249, 225, 246, 196, 176, 147, 82, 53, 39),
        (208, 207, 160, 137, 106, 80, 55, 42, 28),
        (205, 170, 127, 112, 81, 65, 53, 35, 25),
        (215, 161, 121, 107, 74, 70, 45, 35, 24),
    ),
    "one skill": (
        (390, 390, 396, 406, 405, 314, 275, 194, 194),
        (380, 372, 349, 350, 336, 283, 255, 185, 134),
        (275, 280, 259, 249, 211, 189, 147, 114, 96),
        (195, 172, 161, 148, 128, 118, 97, 77, 62),
    ),
}
# fmt: on


def expected_width(
    prompts: int, group_size: int, assumed: str
) -> tuple[float, float] | None:
    """(share of measurements that tell a std, half width of its interval there).

    None for fewer prompts or samples than were simulated; of more than the most, as of
    the most. The width is of no use where the share is 0.

    Args:
        prompts: P, with signal.
        group_size: G.
        assumed: A key of ASSUMED.
    """
    if prompts < PROMPTS[0] or group_size < GROUP_SIZES[0]:
        return None
    at = _place(GROUP_SIZES, group_size), _place(PROMPTS, prompts)
    told, half = (_between(x[assumed], *at) for x in (_TOLD, _HALF))
    return told / 100, half / 1000


def prompts_needed(half: float, group_size: int, assumed: str) -> int | None:
    """The fewest prompts that tell a std at least half the time, to +-`half` or better.

    None: not even PROMPTS[-1] do, or there are fewer samples than were simulated.
    """
    if group_size < GROUP_SIZES[0]:
        return None
    for prompts in range(PROMPTS[0], PROMPTS[-1] + 1):
        told, width = expected_width(prompts, group_size, assumed) or (0.0, math.inf)
        if told >= SELDOM and width <= half:
            return prompts
    return None


def _place(grid: Sequence[int], x: int) -> tuple[int, int, float]:
    """(index below, index above, how far between them in logs)."""
    x = min(x, grid[-1])
    above = bisect.bisect_left(grid, x)
    below = above if grid[above] == x else above - 1
    low, high = math.log(grid[below]), math.log(grid[above])
    return below, above, (math.log(x) - low) / (high - low) if high > low else 0.0


def _between(
    table: Sequence[Sequence[int]],
    row: tuple[int, int, float],
    column: tuple[int, int, float],
) -> float:
    """The entry between four neighbours, linear in both places."""
    left, right, along = column
    low, high = (
        (1 - along) * table[i][left] + along * table[i][right] for i in row[:2]
    )
    return (1 - row[2]) * low + row[2] * high
