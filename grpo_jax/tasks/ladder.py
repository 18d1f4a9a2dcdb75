"""Ladder: short unrelated skills in levels, generated, nothing to download.

Each prompt follows two solved examples of its skill, as earlier turns of a chat:
without them a small model talks where it should answer. Answers are a word, a list or
a number, some after one or two steps of arithmetic. Levels follow what a model of
135 M parameters solves before training: nearly all of level 1, nearly nothing of the
last, though neighbours may not differ. Most skills have little in common: all levels
together are a mix of tasks.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.types import Example
from grpo_jax.streams import Stream, host_rng
from grpo_jax.tasks.build import (
    HELDOUT,
    SourcedExample,
    TaskRequest,
    check_present,
    default_template,
    text_task,
)
from grpo_jax.tasks.types import Task

TRAIN = 4096
TRIES = 1000  # draws in a row without a new question after which a skill has no more

_WORDS = [
    "dog", "cat", "sun", "tree", "house", "river", "apple", "chair", "stone",
    "cloud", "bread", "horse", "king", "rain", "wolf", "book", "shoe", "milk",
    "door", "fish", "moon", "hand", "bird", "cake", "ship", "ring", "lamp",
    "road", "snow", "wind", "bell", "coin", "desk", "farm", "gate", "hill",
    "iron", "jar", "knife", "leaf", "map", "nest", "oven", "pearl", "queen",
    "rope", "salt", "tower", "valley", "wagon", "yard", "zebra", "bridge",
    "candle", "flower", "garden", "island", "lemon", "mirror",
]  # fmt: skip
_NAMES = [
    "Ann", "Ben", "Eva", "Tom", "Mia", "Sam", "Leo", "Zoe",
]  # fmt: skip
_THINGS = [
    "apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs",
]  # fmt: skip
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
    "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = [
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip


class _Question(NamedTuple):
    """A question, and the text that answers it: it ends on the answer."""

    question: str
    solution: str

    @property
    def answer(self) -> str:
        """What follows the last "=": the solution where there is none."""
        return self.solution.rpartition("= ")[2]


class _Skill(NamedTuple):
    """A kind of question, and how one is drawn."""

    level: int
    name: str
    draw: Callable[["_Draw"], _Question]
    examples: tuple[_Question, _Question]


class _Draw:
    """Parts of questions, drawn by a generator."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def number(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """Different numbers from low to high, both included."""
        drawn = self._rng.choice(high - low + 1, size=count, replace=False)
        return [low + int(n) for n in drawn]

    def words(self, count: int) -> list[str]:
        """Different words."""
        return [_WORDS[n] for n in self.numbers(count, 0, len(_WORDS) - 1)]

    def owner(self) -> tuple[str, str]:
        """A name, and things to count."""
        name = _NAMES[self.number(0, len(_NAMES) - 1)]
        return name, _THINGS[self.number(0, len(_THINGS) - 1)]


def in_words(number: int) -> str:
    """A number below 1000 in English words."""
    if number >= 100:
        hundreds = f"{_SMALL[number // 100]} hundred"
        return f"{hundreds} {in_words(number % 100)}" if number % 100 else hundreds
    if number < 20:
        return _SMALL[number]
    tens = _TENS[number // 10 - 2]
    return f"{tens}-{_SMALL[number % 10]}" if number % 10 else tens


def _number(draw: _Draw) -> _Question:
    number, (word,) = draw.number(2, 99), draw.words(1)
    return _Question(f"Number: {number} {word}", str(number))


def _word(draw: _Draw) -> _Question:
    number, (word,) = draw.number(2, 99), draw.words(1)
    return _Question(f"Word: {number} {word}", word)


def _repeat(draw: _Draw) -> _Question:
    number = draw.number(10, 9999)
    return _Question(f"Repeat: {number}", str(number))


def _copy(draw: _Draw) -> _Question:
    words = " ".join(draw.words(2))
    return _Question(f"Repeat: {words}", words)


def _first(draw: _Draw) -> _Question:
    words = draw.words(3)
    return _Question(f"First word: {', '.join(words)}", words[0])


def _second(draw: _Draw) -> _Question:
    words = draw.words(3)
    return _Question(f"Second word: {', '.join(words)}", words[1])


def _last(draw: _Draw) -> _Question:
    words = draw.words(3)
    return _Question(f"Last word: {', '.join(words)}", words[-1])


def _reverse(draw: _Draw) -> _Question:
    words = draw.words(3)
    return _Question(f"Reverse: {', '.join(words)}", ", ".join(words[::-1]))


def _capitals(draw: _Draw) -> _Question:
    number, (word,) = draw.number(2, 99), draw.words(1)
    return _Question(f"In capitals: {number} {word}", f"{number} {word.upper()}")


def _count(draw: _Draw) -> _Question:
    count = draw.number(2, 6)
    return _Question(f"Count the words: {', '.join(draw.words(count))}", str(count))


def _smaller(draw: _Draw) -> _Question:
    a, b = draw.numbers(2, 10, 99)
    return _Question(f"Smaller: {a} or {b}", str(min(a, b)))


def _largest(draw: _Draw) -> _Question:
    numbers = draw.numbers(4, 1, 99)
    return _Question(f"Largest: {', '.join(map(str, numbers))}", str(max(numbers)))


def _sort(draw: _Draw) -> _Question:
    numbers = draw.numbers(3, 1, 30)
    given, ordered = (", ".join(map(str, n)) for n in (numbers, sorted(numbers)))
    return _Question(f"Sort: {given}", ordered)


def _even(draw: _Draw) -> _Question:
    number = draw.number(10, 999)
    return _Question(f"Even or odd: {number}", "odd" if number % 2 else "even")


def _digits(draw: _Draw) -> _Question:
    number = draw.number(20, 999)
    return _Question(f"In digits: {in_words(number)}", str(number))


def _spell(draw: _Draw) -> _Question:
    number = draw.number(20, 999)
    return _Question(f"In words: {number}", in_words(number))


def _add(draw: _Draw) -> _Question:
    a, b = draw.number(1, 9), draw.number(1, 9)
    return _Question(f"Add: {a} + {b}", f"{a} + {b} = {a + b}")


def _add_two_digits(draw: _Draw) -> _Question:
    a, b = draw.number(11, 89), draw.number(11, 89)
    return _Question(f"Add: {a} + {b}", f"{a} + {b} = {a + b}")


def _multiply(draw: _Draw) -> _Question:
    a, b = draw.number(12, 99), draw.number(3, 9)
    return _Question(f"Multiply: {a} * {b}", f"{a} * {b} = {a * b}")


def _remainder(draw: _Draw) -> _Question:
    a, b = draw.number(10, 99), draw.number(3, 9)
    return _Question(f"Remainder of {a} / {b}", str(a % b))


def _unit(draw: _Draw) -> _Question:
    a, b, name = draw.number(2, 9), draw.number(2, 9), draw.owner()[0]
    return _Question(f"{name} walks {a} km, then {b} km. How far?", f"{a + b} km")


def _buy(draw: _Draw) -> _Question:
    (name, things), a, b = draw.owner(), draw.number(3, 20), draw.number(2, 9)
    question = f"{name} has {a} {things} and buys {b} more. How many?"
    return _Question(question, f"{a} + {b} = {a + b}")


def _boxes(draw: _Draw) -> _Question:
    (name, things), a, b = draw.owner(), draw.number(2, 9), draw.number(2, 9)
    question = f"{name} has {a} boxes of {b} {things}. How many?"
    return _Question(question, f"{a} * {b} = {a * b}")


def _share(draw: _Draw) -> _Question:
    (name, things), friends, each = draw.owner(), draw.number(2, 9), draw.number(2, 9)
    total = friends * each
    question = f"{name} shares {total} {things} among {friends} friends. How many each?"
    return _Question(question, f"{total} / {friends} = {each}")


def _buy_and_lose(draw: _Draw) -> _Question:
    name, things = draw.owner()
    a, b, c = draw.number(10, 20), draw.number(2, 9), draw.number(2, 9)
    question = f"{name} has {a} {things}, buys {b} and loses {c}. How many?"
    return _Question(question, f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}")


def _boxes_and_lose(draw: _Draw) -> _Question:
    name, things = draw.owner()
    a, b, c = draw.number(3, 9), draw.number(4, 9), draw.number(2, 9)
    question = f"{name} has {a} boxes of {b} {things} and loses {c}. How many?"
    return _Question(question, f"{a} * {b} = {a * b}, {a * b} - {c} = {a * b - c}")


def _skill(level: int, draw: Callable[[_Draw], _Question], seed: int) -> _Skill:
    """A skill, named as the function, with two examples that `seed` decides."""
    source = _Draw(np.random.default_rng(seed))
    first = second = draw(source)
    while second.answer == first.answer:
        second = draw(source)
    return _Skill(level, draw.__name__.strip("_"), draw, (first, second))


SKILLS = tuple(
    _skill(level, draw, seed)
    for seed, (level, draw) in enumerate(
        [
            (1, _number), (1, _repeat), (1, _add),
            (2, _word), (2, _last), (2, _copy),
            (3, _first), (3, _smaller), (3, _boxes),
            (4, _buy), (4, _even), (4, _share),
            (5, _add_two_digits), (5, _spell), (5, _capitals),
            (6, _largest), (6, _second), (6, _digits),
            (7, _count), (7, _remainder), (7, _reverse), (7, _unit),
            (8, _sort), (8, _multiply), (8, _buy_and_lose), (8, _boxes_and_lose),
        ]
    )
)  # fmt: skip


def make_ladder(
    request: TaskRequest,
    *,
    levels: Sequence[str | int] = (),
    skills: Sequence[str] = (),
) -> Task:
    """Trained and held-out prompts, equally many of each skill as far as they go.

    Args:
        levels, skills: Only these, as (1, 2) and ("add", "sort"); empty: all.
    """
    chosen = _chosen(levels, skills)
    rows = _rows(request, chosen)
    heldout_prompts = request.heldout_prompts or HELDOUT
    asked = (request.train_prompts or TRAIN) + heldout_prompts
    if len(rows) < asked and (request.train_prompts or request.heldout_prompts):
        raise ConfigError(
            f"task.train_prompts and task.heldout_prompts must be at most {len(rows)} "
            f"together, the questions that these skills have, got {asked} (of which "
            "defaults count); ask for fewer, or for more levels."
        )
    count = max(1, len(rows) * heldout_prompts // asked)
    return text_task(
        request._replace(train_prompts=None, heldout_prompts=count),
        name="ladder",
        train=rows[count:],
        heldout=rows[:count],
        default_reward="number_or_exact",
        batch_size=64,
        note="Held-out prompts need the same skills as trained ones.",
    )


def _chosen(levels: Sequence[str | int], skills: Sequence[str]) -> list[_Skill]:
    """The skills asked for."""
    check_present("levels", levels, [skill.level for skill in SKILLS])
    check_present("skills", skills, [skill.name for skill in SKILLS])
    wanted = {str(level) for level in levels}
    chosen = [
        skill
        for skill in SKILLS
        if (not wanted or str(skill.level) in wanted)
        and (not skills or skill.name in skills)
    ]
    if not chosen:
        raise ConfigError(
            "no skill of task.skills is of the levels in task.levels; ask for more."
        )
    return chosen


def _rows(request: TaskRequest, skills: Sequence[_Skill]) -> list[SourcedExample]:
    """Different questions, as many as asked for or as there are, so ordered that every
    beginning has all skills in equal shares of what they have."""
    count = (request.train_prompts or TRAIN) + (request.heldout_prompts or HELDOUT)
    draw = _Draw(host_rng(request.seed, Stream.PUZZLES))
    shown = {example.question for skill in skills for example in skill.examples}
    found: dict[_Skill, dict[str, _Question]] = {skill: {} for skill in skills}
    left, total = list(skills), 0
    for skill in itertools.cycle(skills):
        if total == count or not left:
            break
        if skill not in left:
            continue
        for _ in range(TRIES):
            drawn = skill.draw(draw)
            if drawn.question not in shown and drawn.question not in found[skill]:
                found[skill][drawn.question] = drawn
                total += 1
                break
        else:
            left.remove(skill)
    placed = [
        ((i + 1) / len(questions), skill, question)
        for skill, questions in found.items()
        for i, question in enumerate(questions.values())
    ]
    chat = default_template(request) == "chat"
    return [
        SourcedExample(f"question {i}", _example(skill, question, chat))
        for i, (_, skill, question) in enumerate(sorted(placed, key=lambda x: x[0]), 1)
    ]


def _example(skill: _Skill, asked: _Question, chat: bool) -> Example:
    """The question after the skill's two examples: as turns, or as lines of text where
    there is no chat template."""
    tags = (("level", str(skill.level)), ("skill", skill.name))
    if not chat:
        solved = "".join(f"{e.question}\n{e.solution}\n\n" for e in skill.examples)
        return Example(
            f"{solved}{asked.question}\n", asked.answer, asked.solution, tags
        )
    turns = tuple(
        turn
        for e in skill.examples
        for turn in (("user", e.question), ("assistant", e.solution))
    )
    return Example(asked.question, asked.answer, asked.solution, tags, turns)
