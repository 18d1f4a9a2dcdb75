"""Ratio axis: the log weight that a term sees, log policy - log behaviour policy.

The only axis that mixes tokens. At the token levels a term is a token; at the sequence
levels (`Ratio.sequence`) the completion is one action and has one term.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # objective.py imports this module
    from grpo_jax.objectives.objective import Objective


class Level(NamedTuple):
    """What a surrogate sees: [P, G, T] at a token level, [P, G, 1] at a sequence's."""

    z: jax.Array  # log-ratio
    logprobs: jax.Array  # of the action: a token's, or the completion's sum (or mean)
    behaviour: jax.Array  # the same of the behaviour policy; constant
    clipped: jax.Array  # [P, G, T] bool: this axis itself left the token no gradient


class Tokens(NamedTuple):
    """What a ratio is made of; `tokens_of` makes it."""

    logprobs: jax.Array  # [P, G, T], the current policy's; 0 outside the mask
    behaviour: jax.Array  # [P, G, T], constant; 0 outside the mask
    mask: jax.Array  # [P, G, T] bool
    advantages: jax.Array  # [P, G, 1] or [P, G, T]; a ratio may read their sign

    def log_ratios(self) -> jax.Array:
        """[P, G, T] log pi - log pi_old of each token."""
        return self.logprobs - self.behaviour

    def gradient_only(self) -> jax.Array:
        """[P, G, T] zeros that have the gradient of logprobs."""
        return self.logprobs - jax.lax.stop_gradient(self.logprobs)

    def mean(self, x: jax.Array) -> jax.Array:
        """[P, G, 1] the mean of x [P, G, T] over each completion's tokens."""
        return x.sum(-1, keepdims=True) / self.lengths().astype(x.dtype)

    def lengths(self) -> jax.Array:
        """[P, G, 1] tokens of each completion, at least 1."""
        return jnp.maximum(self.mask.sum(-1, keepdims=True), 1)

    def level(self, z: jax.Array) -> Level:
        """The tokens as terms with log-ratio z [P, G, T]."""
        return Level(z, self.logprobs, self.behaviour, jnp.zeros_like(self.mask))


def tokens_of(
    logprobs: jax.Array, behaviour: jax.Array, mask: jax.Array, advantages: jax.Array
) -> Tokens:
    """Tokens from log-probs [P, G, T] that are finite inside the mask [P, G, T].

    Padding may hold anything, so it is cut off before it meets exp: 0 * inf is NaN.
    """
    logprobs = jnp.where(mask, logprobs, 0.0)
    behaviour = jnp.where(mask, jax.lax.stop_gradient(behaviour), 0.0)
    return Tokens(logprobs, behaviour, mask, advantages)


def standardised(tokens: Tokens) -> Level:
    """Log-ratios centred over the completion and shrunk to a spread of at most 1.

    Mean and spread are constants (what carries over of GRPO-Guard, arXiv:2510.22319).
    """
    d = tokens.log_ratios()
    centre = tokens.mean(d)
    spread = jnp.sqrt(tokens.mean(jnp.where(tokens.mask, d - centre, 0.0) ** 2))
    centre, spread = jax.lax.stop_gradient((centre, jnp.maximum(spread, 1)))
    return tokens.level(jnp.where(tokens.mask, (d - centre) / spread, 0.0))


def sequence_mean_token(tokens: Tokens) -> Level:
    """GSPO's value at every token, with the token's own gradient (arXiv:2507.18071)."""
    mean = jax.lax.stop_gradient(tokens.mean(tokens.log_ratios()))
    return tokens.level(mean + tokens.gradient_only())


def sequence_mean(tokens: Tokens) -> Level:
    """The |o|-th root of the completion's ratio: GSPO (arXiv:2507.18071)."""
    logprobs, behaviour = tokens.mean(tokens.logprobs), tokens.mean(tokens.behaviour)
    mean = tokens.mean(tokens.log_ratios())
    return Level(mean, logprobs, behaviour, jnp.zeros_like(tokens.mask))


def sequence_sum(tokens: Tokens) -> Level:
    """The completion's ratio: TIC-GRPO (arXiv:2508.02833), RLOO in TRL."""
    arrays = tokens.log_ratios(), tokens.logprobs, tokens.behaviour
    z, logprobs, behaviour = (x.sum(-1, keepdims=True) for x in arrays)
    return Level(z, logprobs, behaviour, jnp.zeros_like(tokens.mask))


def clipped_geometric(tokens: Tokens, clip: tuple[float | None, float]) -> Level:
    """The mean of token log-ratios, each cut on one side: GMPO (arXiv:2507.20673).

    The cut is at `high` where A >= 0 and at -`low` where A < 0, in log space.
    """
    (low, high), d = clip, tokens.log_ratios()
    up = tokens.advantages >= 0
    below = jnp.zeros_like(tokens.mask) if low is None else d < -(low or 0.0)
    clipped = jnp.where(up, d > high, below) & tokens.mask
    edge = jnp.where(up, high, -(low or 0.0))
    z = tokens.mean(jnp.where(clipped, edge, d))
    logprobs, behaviour = tokens.mean(tokens.logprobs), tokens.mean(tokens.behaviour)
    return Level(z, logprobs, behaviour, clipped)


class Ratio(NamedTuple):
    """A row of `RATIOS`.

    Attributes:
        level: (objective, Tokens) -> Level.
        text: objective -> how `Objective.formula` writes r.
        uses: The objective's numbers that it reads.
        sequence: A completion has one term, z is [P, G, 1].
        corrects: It can differ from 1, so that a second update may be made.
        reads_sign: It depends on the sign of the advantages.
    """

    level: Callable[["Objective", Tokens], Level]
    text: Callable[["Objective"], str]
    uses: tuple[str, ...] = ()
    sequence: bool = False
    corrects: bool = True
    reads_sign: bool = False


def _geometric_text(o: "Objective") -> str:
    low, high = o.clip
    floor = "" if low is None else f" (A < 0: at least {-low:g})"
    return f"exp mean_t d, d = log pi / pi_old cut at {high:g}{floor}"


RATIOS = {
    "none": Ratio(
        lambda o, x: x.level(x.gradient_only()), lambda o: "pi / sg pi", corrects=False
    ),
    "token": Ratio(lambda o, x: x.level(x.log_ratios()), lambda o: "pi / pi_old"),
    "standardised": Ratio(
        lambda o, x: standardised(x),
        lambda o: "exp z, z = (d - mean_t d) / max(std_t d, 1), d = log pi / pi_old",
    ),
    "sequence_mean_token": Ratio(
        lambda o, x: sequence_mean_token(x),
        lambda o: "sg(prod_t pi / pi_old)^(1/|o|) pi / sg pi",
    ),
    "sequence_mean": Ratio(
        lambda o, x: sequence_mean(x),
        lambda o: "(prod_t pi / pi_old)^(1/|o|)",
        sequence=True,
    ),
    "sequence_sum": Ratio(
        lambda o, x: sequence_sum(x), lambda o: "prod_t pi / pi_old", sequence=True
    ),
    "clipped_geometric": Ratio(
        lambda o, x: clipped_geometric(x, o.clip),
        _geometric_text,
        ("clip",),
        sequence=True,
        reads_sign=True,
    ),
}
