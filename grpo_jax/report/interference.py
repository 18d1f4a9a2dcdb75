"""What other prompts' gradients do to hard prompts, and whether chance could do it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.instrument.rows import Row, pass_rates, values

HARD = 1 / 3  # pass rate below which a prompt is hard
_FLIPS = 2000  # of the prompts' signs, behind a band


class Effect(NamedTuple):
    """First-order change of hard prompts' expected rewards by a plain gradient step.

    Of length 1 but for what the gradients have in common (`first_order_changes`);
    means over hard prompts with signal, and over measurements.
    """

    prompts: int  # hard ones with signal, over all measurements
    different: int  # of them; the others are the same prompts once more
    measurements: int  # that have one
    own: float  # by the prompt's own gradient
    others: float  # by the other prompts' gradients
    hurt: float  # share of hard prompts that the others' gradients lower
    band: tuple[float, float] | None  # 95 % of `others` under random signs of the
    # prompts' sampled gradients; None where the gradients are exact

    @property
    def direction(self) -> int:
        """Sign of the others' effect; 0 where chance is enough for it.

        Where they have none (orthogonal gradients, or signs at random), a sampled
        effect is given a sign with probability .05 at most.
        """
        low, high = self.band or (0.0, 0.0)
        slack = 1e-9 * max(abs(low), abs(high))  # rounding of equal sums
        return int(self.others > high + slack) - int(self.others < low - slack)


class _Products(NamedTuple):
    """One measurement's gradients; prompts without signal have zeros in `between`."""

    own: np.ndarray  # [P] squared norms, debiased where they are sampled
    between: np.ndarray  # [P, P] inner products of two prompts, 0 on the diagonal
    length: float  # of the step, but for what the gradients have in common
    hard: np.ndarray  # [P] hard prompts with signal


def effect_on_hard(rows: Sequence[Row]) -> Effect | None:
    """The effect over all measurements; None without a hard prompt with signal.

    By exact gradients where rows have them in full, else by sampled ones.
    """
    exact = [
        r for r in rows if r["exact"] is not None and r.get("directions", 0) is None
    ]
    products = [_exact(row) for row in exact] or [_sampled(row) for row in rows]
    products = [x for x in products if x.hard.any()]
    if not products:
        return None
    others = np.concatenate([x.between[x.hard].sum(1) for x in products])
    own = [x.own[x.hard].mean() / x.length for x in products]
    parts = [_part(x) for x in products]
    return Effect(
        len(others),
        int(np.any([x.hard for x in products], axis=0).sum()),
        len(products),
        float(np.mean(own)),
        float(np.mean([x.sum() for x in parts])),
        float((others < 0).mean()),
        None if exact else _band(parts),
    )


def _part(x: _Products) -> np.ndarray:
    """[P, P] whose sum is the others' mean effect on the hard prompts."""
    return np.where(x.hard[:, None], x.between, 0.0) / (x.hard.sum() * x.length)


def _band(parts: list[np.ndarray]) -> tuple[float, float]:
    """95 % of the mean over measurements of the sum of parts under random signs."""
    rng = np.random.default_rng(0)
    total = np.zeros(_FLIPS)
    for part in parts:
        signs = rng.choice([-1.0, 1.0], size=(_FLIPS, len(part)))
        total += ((signs @ part) * signs).sum(1)
    low, high = np.percentile(total / len(parts), [2.5, 97.5])
    return float(low), float(high)


def _sampled(row: Row) -> _Products:
    raw = values([row], "geometry", "raw_squared_norms")[0]
    return _products(
        row, "geometry", raw, values([row], "geometry", "squared_norms")[0]
    )


def _exact(row: Row) -> _Products:
    squares = values([row], "exact", "norms")[0] ** 2
    return _products(row, "exact", squares, squares)


def _products(row: Row, field: str, raw: np.ndarray, own: np.ndarray) -> _Products:
    """From the cosines of a field, and squared norms [P] raw and debiased."""
    cosines = values([row], field, "cosines")[0]
    signal = np.isfinite(np.diag(cosines)) & np.isfinite(own) & (raw > 0)
    norms = np.sqrt(np.where(signal, raw, 0.0))
    between = np.nan_to_num(cosines) * norms[:, None] * norms
    np.fill_diagonal(between, 0.0)
    length = float(np.sqrt((norms**2).sum()))
    return _Products(own, between, length, signal & (pass_rates(row) < HARD))
