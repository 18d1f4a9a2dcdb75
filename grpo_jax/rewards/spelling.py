"""Numbers of data files as the text of a gold answer."""

from decimal import Decimal
from typing import Any

import numpy as np

from grpo_jax.rewards.numbers import MAX_DIGITS


def spelled(value: Any) -> str | None:
    """The text of a field that is text or a number; None for any other.

    Numbers are plain decimals, the shortest that give the value back in its own
    precision: 0.0000001 for 1e-7, 0.1 for float32's 0.1. NaN, infinities and truth
    values are no numbers.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        if isinstance(value, np.floating) and value.itemsize < 8:
            value = Decimal(str(value))
        else:
            value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        # int() of more digits is refused by Python, and would take its time.
        return str(value) if value.bit_length() < 14_000 else None
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if not number.is_finite() or abs(number.adjusted()) > MAX_DIGITS:
        return None
    return format(number, "f")
