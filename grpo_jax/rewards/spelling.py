"""Numbers of data files as the text of a gold answer."""

from decimal import Decimal
from typing import Any, Self

import numpy as np

from grpo_jax.rewards.numbers import MAX_DIGITS


class Written(Decimal):
    """A number of a JSON file.

    Attributes:
        text: As the file writes it, such as "1E3".
    """

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __repr__(self) -> str:
        return self.text


def spelled(value: Any) -> str | None:
    """The text of a field that is text or a number; None for any other.

    Numbers are plain decimals. Those of a text keep its digits: 1.50 for JSON's 1.50,
    1000 for 1E3. Others are the shortest that give the value back in its own precision:
    0.0000001 for 1e-7, 0.1 for float32's 0.1, 72 for 72.0. NaN, infinities and truth
    values are no numbers.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        if isinstance(value, np.floating) and value.itemsize < 8:
            value = float(str(value))
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
    text = format(number, "f")
    return text.removesuffix(".0") if isinstance(value, float) else text
