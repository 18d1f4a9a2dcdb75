"""A sentence on how many prompts and samples a measurement would need."""

from grpo_jax.instrument.widths import ASSUMED, GROUP_SIZES, PROMPTS, prompts_needed

_WIDTH = 0.1  # of the std of cosines: +-, that is worth having


def prompts_text(group_size: int) -> str:
    """How many prompts would tell the std of cosines, by `prompts_needed`."""
    if group_size < GROUP_SIZES[0]:
        return (
            f"Take {GROUP_SIZES[0]} samples of each prompt or more, better "
            f"{2 * GROUP_SIZES[0]}: groups of {group_size} seldom tell anything."
        )
    sizes = [group_size, 2 * group_size]
    texts = []
    for size in sizes:
        counts = {name: prompts_needed(_WIDTH, size, name) for name in ASSUMED}
        wanted = [
            f"{n} prompts of {name}"
            if n
            else f"of {name} more than {PROMPTS[-1]} prompts, if any number"
            for name, n in counts.items()
        ]
        texts.append(f"with {size} samples of each {' or '.join(wanted)}")
        if all(counts.values()):
            break
    return (
        f"What tells the std of the cosines to +-{_WIDTH} in half of measurements: "
        f"{', '.join(texts)} (grpo-jax plan says on what assumptions)."
    )
