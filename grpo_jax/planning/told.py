"""What `grpo-jax plan` says of the instrument: what its measurements will tell."""

from typing import Any

from grpo_jax.instrument.plan import ProbePlan
from grpo_jax.instrument.widths import (
    ASSUMED,
    GROUP_SIZES,
    PROMPTS,
    expected_width,
    prompts_needed,
)

WIDTHS = (0.1, 0.03)  # of the std of cosines: +-, that a user may want
MORE_SAMPLES = 32  # of a prompt, beside the run's own


def told_by(probe: ProbePlan) -> dict[str, Any]:
    """What a measurement will tell of the std of the cosines between prompts' gradients
    (`expected_width`), by what prompts are assumed to be; null: nothing is known."""
    expected, needed = {}, {}
    for name in ASSUMED:
        told = expected_width(probe.prompts, probe.group_size, name)
        expected[name] = told and {"told": told[0], "half_width": told[1]}
        needed[name] = {
            str(width): {
                str(g): prompts_needed(width, g, name)
                for g in sorted({max(probe.group_size, GROUP_SIZES[0]), MORE_SAMPLES})
            }
            for width in WIDTHS
        }
    return {
        "prompts": probe.prompts,
        "group_size": probe.group_size,
        "std_of_cosines": expected,
        "prompts_needed": needed,  # to tell it half the time; width -> group size
    }


def told_lines(instrument: dict[str, Any]) -> list[str]:
    """`told_by` as a table with what it assumes."""
    needed, prompts = instrument["prompts_needed"], instrument["prompts"]
    told = [_told_text(x) for x in instrument["std_of_cosines"].values()]
    lines = [
        "what a measurement will tell of the cosines between prompts' gradients",
        _cells("their std", list(ASSUMED)),
        _cells(f"{prompts} prompts x {instrument['group_size']} samples", told),
    ]
    for width, by_group in next(iter(needed.values())).items():
        for g in by_group:
            counts = [needed[name][width][g] for name in ASSUMED]
            texts = [f"{n} prompts" if n else f"not by {PROMPTS[-1]}" for n in counts]
            lines.append(_cells(f"to +-{float(width):.2f}, x {g} samples", texts))
    signal = " and ".join(f"{at} ({name})" for name, at in ASSUMED.items())
    return [
        *lines,
        "  share of measurements that tell it (half, where prompts are counted), and",
        "  its 95 % interval, of prompts with pass rates from 1/8 to 7/8, if gradients",
        "  are as SmolLM2-135M's on task ladder before training: half of a squared",
        f"  norm is signal at {signal} samples",
        "  (experiments/interval_widths.py)",
    ]


def _cells(text: str, cells: list[str]) -> str:
    return f"  {text:<30}" + "".join(f"{cell:>18}" for cell in cells)


def _told_text(told: dict[str, float] | None) -> str:
    if told is None or not told["told"]:
        return "-"
    return f"{100 * told['told']:.0f} %, +-{told['half_width']:.2f}"
