"""Surrogate axis: each term's loss, elementwise. The trust region lives only here.

Every function takes z, the log-ratio of `ratios.py`, the advantages A and, where a
method uses it, the policy's log-probs; it returns (loss, clipped), `clipped` being True
where the trust region left no gradient. All are positively homogeneous in A, so a
positive weight on a prompt may be applied to its advantages, its loss or its gradient
alike. What is not proportional to A is a penalty (`fisher_rao_penalty`) and stays
outside the weights. `sg` below is stop_gradient, r = exp z. Arrays are [P, G, T], or
[P, G, 1] under a sequence ratio.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.objectives.ratios import Level

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective

_MAX_LOG_RATIO = 20.0  # exp overflows float32 at 88, its products long before
Clip = tuple[float | None, float]  # (low, high): r in [1 - low, 1 + high]; None: no low
Terms = tuple[jax.Array, jax.Array]  # (loss, clipped)


def bounded_ratio(z: jax.Array) -> jax.Array:
    """[...] exp z with z cut at +-20: beyond it the gradient is 0, never 0 * inf."""
    return jnp.exp(jnp.clip(z, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def logp(logprobs: jax.Array, advantages: jax.Array) -> Terms:
    """[...] -A log pi: REINFORCE."""
    loss = -advantages * logprobs
    return loss, jnp.zeros_like(loss, bool)


def importance(z: jax.Array, advantages: jax.Array) -> Terms:
    """[...] -A r, unclipped."""
    loss = -advantages * bounded_ratio(z)
    return loss, jnp.zeros_like(loss, bool)


def ppo(
    z: jax.Array,
    advantages: jax.Array,
    clip: Clip,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Terms:
    """[...] -min(r A, clip(r, 1 - low, 1 + high) A) (arXiv:1707.06347).

    Args:
        dual_clip: c > 1; where A < 0 the loss is at most -c A (arXiv:1912.09729).
        ratio_cap: Upper bound on r in the unclipped branch too (arXiv:2505.07291).
    """
    low, high = _edges(clip)
    above = (z > high) & (advantages > 0)
    clipped = above | ((z < low) & (advantages < 0))
    ratio = bounded_ratio(z)
    within = jnp.clip(ratio, math.exp(low), math.exp(high))
    if ratio_cap is not None:
        clipped |= (z > math.log(ratio_cap)) & (advantages < 0)
        ratio = jnp.minimum(ratio, ratio_cap)
    loss = -jnp.minimum(ratio * advantages, within * advantages)
    if dual_clip is not None:
        clipped |= (z > math.log(dual_clip)) & (advantages < 0)
        bound = -dual_clip * advantages
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    return loss, clipped


def hard_clip(z: jax.Array, advantages: jax.Array, clip: Clip) -> Terms:
    """[...] -clip(r) A: no gradient outside the edges, whatever the sign of A.

    Cut in log space, and the edge itself keeps its gradient: with no lower edge this is
    TIC-GRPO's min{w, 1 + high} A (arXiv:2508.02833, eq. 8).
    """
    low, high = _edges(clip)
    clipped = (z > high) | (z < low)
    inside = jnp.where(clipped, jnp.clip(jax.lax.stop_gradient(z), low, high), z)
    loss = -advantages * bounded_ratio(inside)
    return loss, jnp.broadcast_to(clipped, loss.shape)


def cispo(
    z: jax.Array, logprobs: jax.Array, advantages: jax.Array, clip: Clip
) -> Terms:
    """[...] -sg(clip(r)) A log pi: every token keeps a gradient (arXiv:2506.13585)."""
    low, high = _edges(clip)
    weight = jnp.exp(jnp.clip(z, max(low, -_MAX_LOG_RATIO), high))
    return logp(logprobs, jax.lax.stop_gradient(weight) * advantages)


def copg(z: jax.Array, logprobs: jax.Array, advantages: jax.Array, clip: Clip) -> Terms:
    """[...] -min(A log pi, A clip(log pi, log pi_old + log(1 -+ eps))).

    PPO's clipped region with r replaced by 1 in the gradient (arXiv:2311.05846).
    """
    low, high = _edges(clip)
    behaviour = jax.lax.stop_gradient(logprobs - z)
    within = jnp.clip(logprobs, behaviour + low, behaviour + high)
    loss = -jnp.minimum(advantages * logprobs, advantages * within)
    above = (z > high) & (advantages > 0)
    return loss, above | ((z < low) & (advantages < 0))


class Classifier(NamedTuple):
    """A row of `HINGES`: the function of the log-ratio, and its text in a formula."""

    value: Callable[[jax.Array], jax.Array]
    text: str


HINGES = {
    "ratio": Classifier(lambda z: jnp.exp(z) - 1, "r - 1"),
    "log": Classifier(lambda z: z, "log r"),
    "sqrt": Classifier(lambda z: jnp.exp(z / 2) - 1, "sqrt r - 1"),
}


def hinge(
    z: jax.Array, advantages: jax.Array, clip: Clip, classifier: str = "ratio"
) -> Terms:
    """[...] |A| max(0, eps - sign(A) f): HPO (arXiv:2110.13799).

    f is one of `HINGES`; eps is clip's high where A > 0 and its low where A < 0. With
    "ratio" the gradient is PPO-clip's.
    """
    low, high = clip
    f = HINGES[classifier].value(jnp.clip(z, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    margin = jnp.where(advantages > 0, high, math.inf if low is None else low)
    room = margin - jnp.sign(advantages) * f
    loss = jnp.abs(advantages) * jnp.where(advantages == 0, 0.0, jnp.maximum(room, 0))
    return loss, (room < 0) & (advantages != 0)


def relative_ratio(z: jax.Array, mixture: float) -> jax.Array:
    """[...] r / (mixture r + 1 - mixture), at most 1 / mixture.

    One algebra, three names: the power-mean correction of reused rollouts
    (arXiv:2506.06178), the weight against a defensive mixture
    Phi = mixture p + (1 - mixture) q, p / Phi (arXiv:2405.05630), and PPO-RPE's
    relative ratio (arXiv:2010.03290).
    """
    # In this form rounding keeps it monotone and below the bound.
    return 1 / (mixture + (1 - mixture) / bounded_ratio(z))


def relative_importance(
    z: jax.Array, logprobs: jax.Array, advantages: jax.Array, mixture: float
) -> Terms:
    """[...] -sg(w) A log pi, w the `relative_ratio`: RT-PG (arXiv:2506.06178)."""
    weight = jax.lax.stop_gradient(relative_ratio(z, mixture))
    return logp(logprobs, weight * advantages)


def relative_pearson(
    z: jax.Array, advantages: jax.Array, clip: Clip, mixture: float
) -> Terms:
    """[...] -A r + C D, D = (1 - m)^2 (r - 1)^2 / (2 (m r + 1 - m)): PPO-RPE's penalty.

    C >= 0, one per sign of A and proportional to |A|, makes the gradient vanish where
    the `relative_ratio` reaches 1 + high (A > 0) or 1 - low (A < 0). Past that point
    it pulls back, so nothing is clipped (arXiv:2010.03290; the constants are derived).
    """
    low, high = clip

    def strength(
        edge: float,
    ) -> float:  # 1 / |dD/dr| where the relative ratio is `edge`
        r = edge * (1 - mixture) / (1 - mixture * edge)
        u = mixture * r + 1 - mixture
        slope = (1 - mixture) ** 2 * ((r - 1) / u - mixture * (r - 1) ** 2 / (2 * u**2))
        return 1 / abs(slope)

    below = 0.0 if low is None else strength(1 - low)
    r = bounded_ratio(z)
    distance = (1 - mixture) ** 2 * (r - 1) ** 2 / (2 * (mixture * r + 1 - mixture))
    factor = jnp.where(advantages > 0, strength(1 + high), below)
    loss = -advantages * r + jnp.abs(advantages) * factor * distance
    return loss, jnp.zeros_like(loss, bool)


def binary_tv(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """[...] |p - q| of log-probabilities [...]."""
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


def binary_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """[...] nats: KL(q || p) of the Bernoullis with log-probabilities [...]."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    rest = jnp.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return q * (log_q - log_p) + (1 - q) * rest


MASKS = {"tv": binary_tv, "kl": binary_kl}


def masked_importance(
    z: jax.Array,
    logprobs: jax.Array,
    advantages: jax.Array,
    *,
    mask: str,
    limit: float,
    ratio_cap: float | None,
) -> Terms:
    """[...] -A sg(min(r, cap)) M log pi: DPPO (arXiv:2602.04879).

    M drops a token that already moved in A's direction by more than `limit`, in the
    distance of `MASKS` between the probabilities now and at sampling.
    """
    log_p = jax.lax.stop_gradient(jnp.minimum(logprobs, 0))
    log_q = jax.lax.stop_gradient(jnp.minimum(logprobs - z, 0))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    distance = MASKS[mask](log_p, log_q)
    onward = jnp.where(advantages > 0, p > q, p < q)
    dropped = (distance > limit) & onward
    weight = bounded_ratio(z)
    if ratio_cap is not None:
        weight = jnp.minimum(weight, ratio_cap)
    weight = jax.lax.stop_gradient(jnp.where(dropped, 0.0, weight))
    loss, _ = logp(logprobs, weight * advantages)
    return loss, dropped


def fisher_rao_penalty(z: jax.Array, behaviour: jax.Array, tau: float) -> jax.Array:
    """[...] pi_old (r - 1)^2 / (2 tau): FR-PPO's term beside -A r (2506.03757)."""
    probability = jnp.exp(jnp.minimum(jax.lax.stop_gradient(behaviour), 0))
    return probability * (bounded_ratio(z) - 1) ** 2 / (2 * tau)


def _edges(clip: Clip) -> tuple[float, float]:
    """(log(1 - low), log(1 + high)); -inf without a lower edge."""
    low, high = clip
    return -math.inf if low is None else math.log1p(-low), math.log1p(high)


class Surrogate(NamedTuple):
    """A row of `SURROGATES`.

    Attributes:
        terms: (objective, level, advantages [.., broadcast]) -> (loss, clipped).
        uses: The objective's numbers that it reads.
        text: objective -> the term, as `Objective.formula` writes it.
        linear: The loss is linear in A, so that a shift of A separates.
        reads_ratio: It depends on r.
        penalty: (objective, level) -> a term beside the loss that is not proportional
            to A, so that prompt weights do not multiply it.
        check: objective -> ValueError where its numbers do not go together.
    """

    terms: Callable[["Objective", Level, jax.Array], Terms]
    uses: tuple[str, ...]
    text: Callable[["Objective"], str]
    linear: bool = False
    reads_ratio: bool = True
    penalty: Callable[["Objective", Level], jax.Array] | None = None
    check: Callable[["Objective"], None] | None = None


def _edges_text(o: "Objective") -> str:
    low, high = o.clip
    return f"{0 if low is None else 1 - low:g}, {1 + high:g}"


def _clip_text(o: "Objective") -> str:
    if o.clip[0] is None:
        return f"min(r, {1 + o.clip[1]:g})"
    return f"clip(r, {_edges_text(o)})"


def _ppo_text(o: "Objective") -> str:
    ratio = "r" if o.ratio_cap is None else f"min(r, {o.ratio_cap:g})"
    text = f"-min({ratio} A, {_clip_text(o)} A)"
    return text if o.dual_clip is None else f"{text}, at most -{o.dual_clip:g} A"


def _hinge_text(o: "Objective") -> str:
    f = HINGES[o.hinge].text
    low, high = o.clip
    margin = f"{high:g}" if low == high else f"({high:g} if A > 0 else {low})"
    return f"|A| max(0, {margin} - sign(A) ({f}))"


def _check_ppo(o: "Objective") -> None:
    if o.ratio_cap is not None and o.ratio_cap < 1 + o.clip[1]:
        raise ValueError(
            f"ratio_cap must be at least 1 + clip's high in ppo, got {o.ratio_cap} and "
            f"{o.clip}; it is the outer bound."
        )


def _check_rpe(o: "Objective") -> None:
    if o.mixture * (1 + o.clip[1]) >= 1:
        raise ValueError(
            f"mixture (1 + clip's high) must be below 1, got {o.mixture} and {o.clip}; "
            "the relative ratio never exceeds 1 / mixture."
        )


SURROGATES = {
    "logp": Surrogate(
        lambda o, x, a: logp(x.logprobs, a),
        (),
        lambda o: "-A log pi",
        linear=True,
        reads_ratio=False,
    ),
    "is": Surrogate(
        lambda o, x, a: importance(x.z, a), (), lambda o: "-r A", linear=True
    ),
    "ppo": Surrogate(
        lambda o, x, a: ppo(x.z, a, o.clip, o.dual_clip, o.ratio_cap),
        ("clip", "dual_clip", "ratio_cap"),
        _ppo_text,
        check=_check_ppo,
    ),
    "hard_clip": Surrogate(
        lambda o, x, a: hard_clip(x.z, a, o.clip),
        ("clip",),
        lambda o: f"-{_clip_text(o)} A",
        linear=True,
    ),
    "cispo": Surrogate(
        lambda o, x, a: cispo(x.z, x.logprobs, a, o.clip),
        ("clip",),
        lambda o: f"-sg({_clip_text(o)}) A log pi",
        linear=True,
    ),
    "copg": Surrogate(
        lambda o, x, a: copg(x.z, x.logprobs, a, o.clip),
        ("clip",),
        lambda o: (
            f"-min(A log pi, A clip(log pi, log pi_old + log [{_edges_text(o)}]))"
        ),
    ),
    "hinge": Surrogate(
        lambda o, x, a: hinge(x.z, a, o.clip, o.hinge), ("clip", "hinge"), _hinge_text
    ),
    "relative_is": Surrogate(
        lambda o, x, a: relative_importance(x.z, x.logprobs, a, o.mixture),
        ("mixture",),
        lambda o: f"-sg(r / ({o.mixture:g} r + {1 - o.mixture:g})) A log pi",
        linear=True,
    ),
    "rpe": Surrogate(
        lambda o, x, a: relative_pearson(x.z, a, o.clip, o.mixture),
        ("clip", "mixture"),
        lambda o: (
            f"-r A + C D, gradient 0 where r / ({o.mixture:g} r + "
            f"{1 - o.mixture:g}) leaves [{_edges_text(o)}]"
        ),
        check=_check_rpe,
    ),
    "masked_is": Surrogate(
        lambda o, x, a: masked_importance(
            x.z, x.logprobs, a, mask=o.mask, limit=o.mask_limit, ratio_cap=o.ratio_cap
        ),
        ("mask", "mask_limit", "ratio_cap"),
        lambda o: (
            f"-sg({'r' if o.ratio_cap is None else f'min(r, {o.ratio_cap:g})'}) "
            f"A log pi, dropped past {o.mask.upper()} {o.mask_limit:g}"
        ),
    ),
    "fisher_rao": Surrogate(
        lambda o, x, a: importance(x.z, a),
        ("tau",),
        lambda o: f"-r A + pi_old (r - 1)^2 / {2 * o.tau:g}",
        linear=True,
        penalty=lambda o, x: fisher_rao_penalty(x.z, x.behaviour, o.tau),
    ),
}
