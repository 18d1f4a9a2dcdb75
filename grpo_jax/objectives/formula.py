"""An objective in words: its loss as it is computed, its choices, its loop."""

import dataclasses
from typing import TYPE_CHECKING

from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.baselines import BASELINES
from grpo_jax.objectives.ratios import RATIOS
from grpo_jax.objectives.scales import SCALES
from grpo_jax.objectives.surrogates import SURROGATES
from grpo_jax.objectives.token_weights import TOKEN_WEIGHTS

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective

_AXES = ["baseline", "scale", "ratio", "surrogate", "aggregation"]
_LOOP = (
    "drafts", "refills", "overlong", "overlong_share", "tis_cap", "stop_deviation",
    "history", "disjoint",
)  # fmt: skip


def loss(o: "Objective") -> str:
    """The loss of one prompt, as it is computed, in one line."""
    surrogate, ratio = SURROGATES[o.surrogate], RATIOS[o.ratio]
    term = surrogate.text(o)
    if surrogate.reads_ratio:
        term += f", r = {ratio.text(o)}"
    if symbol := TOKEN_WEIGHTS[o.token_weight]:
        term = f"{symbol} [{term}]"
    if o.entropy_limit is not None:
        term = f"1[H_i <= {o.entropy_limit:.4g}] {term}"
    advantage = _advantage(o)
    kl = f"{o.kl_coef:g} {{}}{o.divergence}({{}}, ref)"
    if o.kl_coef and o.kl_in == "loss":
        term = f"[{term}] + {kl.format('mean_t ' if ratio.sequence else '', 'pi')}"
    if o.kl_coef and o.kl_in == "reward":
        scale = SCALES[o.scale]
        if scale.divisor(o) is None:
            advantage += f", R less {kl.format('sum_t ', 'pi_old')}"
        else:  # not divided
            length = "1/|o| " if scale.by_length else ""
            text = BASELINES[o.baseline].text
            advantage += f" - {o.kl_coef:g} (K{text}), K = {length}sum_t "
            advantage += f"{o.divergence}(pi_old, ref)"
    return f"{_total(o)} {term};  A = {advantage}"


def _total(o: "Objective") -> str:
    aggregation = AGGREGATIONS[o.aggregation]
    if not RATIOS[o.ratio].sequence:
        return aggregation.text(o)
    return aggregation.sequence_text or f"{aggregation.text(o)} 1/|o|"


def _advantage(o: "Objective") -> str:
    scale = SCALES[o.scale]
    text = ("R/|o|" if scale.by_length else "R") + BASELINES[o.baseline].text
    divisor = scale.divisor(o)
    if divisor is not None:
        text = f"({text}) / ({divisor})"
    if o.entropy_coef:
        text += f" - {o.entropy_coef:g} H_i"
    return text


def choices(o: "Objective") -> str:
    """The choice on every axis, and the numbers that these choices read."""
    axes = _AXES if o.token_weight == "none" else [*_AXES, "token_weight"]
    numbers = o.uses().difference(_AXES, ["token_weight"], _LOOP)
    names = [f.name for f in dataclasses.fields(o) if f.name in numbers]
    names = axes + [name for name in names if getattr(o, name)]
    return ", ".join(f"{name} {getattr(o, name)}" for name in names)


def mechanisms(o: "Objective") -> list[str]:
    """What the loop around the loss has to do, in words; [] for most."""
    punish = f"rewards fall by up to 1 over the last {o.overlong_share:.0%} of T"
    rows = (
        (o.drafts, f"{o.drafts} drafts, the best appended to the prompt"),
        (o.refills, f"tied groups sampled again, up to {o.refills} times"),
        (o.overlong == "mask", "completions cut off have weight 0"),
        (o.overlong == "punish", punish),
        (o.tis_cap, f"weight min(pi / sampler's pi, {o.tis_cap})"),
        (
            o.stop_deviation,
            f"no more updates once mean |r - 1| > {o.stop_deviation}",
        ),
        (o.history > 1, f"rollouts of the last {o.history} iterates"),
        (o.disjoint, "each update of a rollout has its own prompts"),
    )
    return [text for given, text in rows if given]
