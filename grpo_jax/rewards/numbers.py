r"""The one reader of numbers, for gold answers and completions alike.

    number   = [sign] (fraction | mixed | decimal)
    fraction = decimal / decimal
    mixed    = integer integer/integer        1 1/2 is one and a half
    decimal  = digits [. digits] [e exponent] 1080   1,080   12 500   .5   1.5e-3

Thousands are separated by one of `, _ '` or a space, in groups of three. Values are
exact rationals. What can be read in two ways is no number: 3,5 (a decimal comma or a
list), 12:30, 1.234.567, 2 3, 5!, 5 million, 5 and a half.
"""

import re
from fractions import Fraction

MAX_DIGITS = 400  # of a number; the plain spelling of a float has up to 325

PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_GROUPED = r"[1-9][0-9]{0,2}(?P<sep>[ ,_'])[0-9]{3}(?:(?P=sep)[0-9]{3})*"
_DECIMAL = re.compile(
    rf"(?P<mantissa>(?:{_GROUPED}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,4}))?"
)
_MIXED = re.compile(r"([0-9,_']+) +(?![0-9]{3}/)([0-9]+)/([0-9]+)")
_LONG = re.compile(
    r"(?P<mantissa>[0-9](?:[0-9]|[ ,_'](?=[0-9]{3})|\.(?=[0-9]))*)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]+))?"
)
# Digits and whatever joins them: all of it is one number, or none is.
_RUN = re.compile(r"\.?[0-9]+(?:(?:[.,:'_]| */ *| +|[eE][+-]?)\.?[0-9]+)*")

_ASCII = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
_ASCII |= dict.fromkeys([0x2212, 0xFE63, *range(0x2010, 0x2014)], "-")
_ASCII |= dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_ASCII |= dict.fromkeys([0x2019, 0x02BC], "'") | dict.fromkeys([0x2044, 0x2215], "/")
_VULGAR = dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", (
    "1/2", "1/3", "2/3", "1/4", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "1/8",
    "3/8", "5/8", "7/8",
), strict=True))  # fmt: skip
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
    rf"(?![0-9])|([{''.join(_VULGAR)}])(?![0-9])"
)
_WRITINGS = [  # of LaTeX and Markdown
    (re.compile(r",\s*\\!\s*|\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|(?<=[0-9])~(?=[0-9])"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree"), "°"),
    (
        re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textrm)\s*\{([^{}]*)\}"),
        r" \1 ",
    ),
    # Currencies and bold marks, but for one between digits: 5$6 is not 56.
    (
        re.compile(
            r"(?<![0-9])(?:\b(?:US|CA|AU|NZ|HK))?\\?[$€£¥₹]|\\?[$€£¥₹](?![0-9])|"
            r"(?<![0-9])\*\*|\*\*(?![0-9])"
        ),
        "",
    ),
    (re.compile(r"\b(?:USD|EUR|GBP|Rs\.?) ?(?=[0-9])"), ""),
]

# Words that change the number before them.
SCALE = re.compile(
    r"\b(?:hal(?:f|ves)|thirds?|quarters?|fifths?|sixths?|eighths?|tenths?|dozens?|"
    r"hundreds?|thousands?|millions?|billions?|trillions?|bn|mn|mil|squared|cubed|"
    r"factorial|plus|minus|times|divided|over|point|one|two|three|four|five|six|seven|"
    r"eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty)\b",
    re.IGNORECASE,
)
_ONE_LETTER = "aAmgshlLdcpFC"  # units, and the article; 5x and 5k are no 5
_SQUARE = (
    r"(?:mm|cm|dm|m|km|in|ft|yd|mi|inch|inches|feet|foot|yards?|miles?|meters?|units?)"
)
# An unknown token, nothing to be seen, or a mark above a digit (0.3\u0305 is 1/3).
_BROKEN = "\ufffd\x00-\x08\x0e-\x1f\x7f\u200b-\u200f\u2060\ufeff\u0304\u0305\u0307"
ENDLESS = re.compile(r"([0-9]\.[0-9]+)\s*(?:\.{2,}|\u2026|\\[lc]?dots(?![A-Za-z]))")
# Before a number, it is part of something else: x5, 10^5, \frac{a}{5}, a/5.
_SPOILS = re.compile(
    rf"(?:[\w^√/{_BROKEN}]|±\s*|\\pm\s*|(?:[\^_}}]|frac|sqrt|binom|\])\{{)$"
)
_DIGIT = re.compile(r"[\d²³¹⁰⁴-⁹₀-₉]")


def plain_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else, by the grammar above."""
    text = text.translate(_ASCII).strip()
    sign, text = (-1 if text[:1] == "-" else 1), re.sub(r"^[+-] *", "", text)
    if mixed := _MIXED.fullmatch(text):
        whole, above, below = (_decimal(part) for part in mixed.groups())
        if whole is None or above is None or below is None or not 0 < above < below:
            return None
        return sign * (whole + above / below)
    above, slash, below = text.partition("/")
    value = _decimal(above.rstrip(" ") if slash else above)
    divisor = _decimal(below.lstrip(" ")) if slash else Fraction(1)
    if value is None or not divisor or (slash and " " in above.strip()):
        return None
    return sign * value / divisor


def too_many_digits(text: str) -> str | None:
    """That a number in a text is longer than is read, in words; None where it is not.

    The digits are those of its plain spelling: 1e999 has a thousand.
    """
    for match in _LONG.finditer(text.translate(_ASCII)):
        digits = sum(map(str.isdecimal, match["mantissa"]))
        exponent = (match["exponent"] or "0").lstrip("+-").lstrip("0")
        if digits > MAX_DIGITS or int(exponent[:5] or 0) > MAX_DIGITS:
            number = match[0]
            shown = number if len(number) <= 60 else f"{number[:40]}...{number[-10:]}"
            return f"has a number of more than {MAX_DIGITS} digits, {shown}"
    return None


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    mantissa = re.sub(r"[ ,_']", "", match["mantissa"])
    exponent = int(match["exponent"] or 0)
    if len(mantissa) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return None
    return Fraction(mantissa) * Fraction(10) ** exponent


def plain_fractions(text: str) -> str:
    """The text with a/b for a \\frac of whole numbers, and 1 a/b for 1\\frac{a}{b}."""
    return _FRACTION.sub(_fraction, text)


def _plain(text: str) -> str:
    """The text with one spelling for what Unicode, LaTeX and Markdown spell in many."""
    text = plain_fractions(text.translate(_ASCII))
    text = ENDLESS.sub("\\1\ufffd", text)  # 0.333... is another number than 0.333
    for pattern, replacement in _WRITINGS:
        text = pattern.sub(replacement, text)
    return text


def _fraction(match: re.Match[str]) -> str:
    above, above1, below, below1, vulgar = match.groups()
    text = _VULGAR[vulgar] if vulgar else f"{above or above1}/{below or below1}"
    after_digit = match.string[: match.start()][-1:].isdecimal()
    return f" {text}" if after_digit else text


def one_number(text: str) -> Fraction | None:
    """The value of a text that is one number, with or without currency, %, a final
    period or a unit; None for any other text."""
    if PLAIN.fullmatch(text := text.strip()):  # most are, and what follows is slow
        return plain_number(text)
    text = _plain(text).strip()
    match = re.match(r"([+-]?)\s*(?=\.?[0-9])", text)
    run = _RUN.match(text, match.end()) if match else None
    if match is None or run is None or not _is_unit(text[run.end() :]):
        return None
    return plain_number(match[1] + run[0])


def _is_unit(rest: str) -> bool:
    """Whether what follows a number leaves it as it is: %, a unit, words."""
    rest = re.sub(r"</?\|?[A-Za-z_]+\|?>", "", rest)  # </answer>
    rest = re.sub(rf"\b({_SQUARE})(?:\^\{{?[23]\}}?|[²³])", r"\1", rest)
    rest = re.sub(r"(?<=[A-Za-z])/(?=[A-Za-z])", "", rest)  # km/h
    if _DIGIT.search(rest) or re.search(rf"[\\^_=<>|+*/√∑π∞±×÷·!:{{}}{_BROKEN}]", rest):
        return False
    letter = re.match(r"\s*([A-Za-z])(?![A-Za-z])", rest)
    if letter and letter[1] not in _ONE_LETTER or re.match(r"\s*-(?![A-Za-z])", rest):
        return False
    return not (SCALE.search(rest) or re.match(r"\s*(?:and|or|to)\b", rest))


def ending_number(text: str) -> Fraction | None:
    """The last number of a text in words; None where what stands last is not one."""
    text = _plain(text)
    runs = list(_RUN.finditer(text))
    if not runs:
        return None
    run = runs.pop()
    area = re.compile(rf"[0-9]\s*(?:square |sq )?{_SQUARE}\^\{{?$")
    if runs and area.search(text[: run.start()]):  # 25 cm^2
        run = runs.pop()
    behind = re.sub("(?<=[A-Za-z])[²³]", "", text[run.end() :])
    if _DIGIT.search(behind) and not re.match(rf"\s*{_SQUARE}\^", behind):
        return None
    sign = _sign(text[: run.start()])
    if sign is None or not _may_follow(behind):
        return None
    return plain_number(sign + run[0])


def _sign(before: str) -> str | None:
    """The sign of the number that follows a text; None where that is no number."""
    before = before[-40:]
    match = re.search(r"([+-])( *)$", before)
    left = before[: match.start()] if match else before
    last = left.rstrip(" ")[-1:] if match and match[2] else left[-1:]
    if match and match[1] == "+" and last.isdecimal():
        return ""  # 3 + 4
    if match is None or match[1] == "+":
        return None if _SPOILS.search(left) else ""
    if re.match(r"[\d)\]}%]", last):
        return ""  # 10 - 3
    if match[2]:  # "it is - 5" may be a dash
        return "-" if last == "=" else None
    return "" if re.match(r"[\w.]", last) else None if last in "+-" and last else "-"


def _may_follow(rest: str) -> bool:
    """Whether a sentence that goes on like this leaves the number as it is."""
    glued = re.match(r"[A-Za-z]+", rest)
    if glued and (len(glued[0]) == 1 and glued[0] not in _ONE_LETTER):
        return False
    if re.match(rf"[\^_√π²³{_BROKEN}]|/ *[A-Za-z](?![A-Za-z])|\\[A-Za-z]", rest):
        return False
    words = re.match(r"(?:[ -]*[A-Za-z]+){1,3}", rest)
    joined = re.match(r"[ -]*(?:and |& )?(?:an? |one )?([A-Za-z]+)", rest)
    return not (words and joined and SCALE.fullmatch(joined[1]))
