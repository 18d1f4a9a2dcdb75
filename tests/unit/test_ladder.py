"""The task ladder: every answer is derived again here, from the question's text."""

import re
from collections import Counter

import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.rewards.verifiers import VERIFIERS
from grpo_jax.rollouts.encoding import encode_prompts
from grpo_jax.rollouts.lengths import completion_tokens
from grpo_jax.tasks.ladder import SKILLS
from grpo_jax.tasks.registry import load_task
from grpo_jax.tasks.tokenizers import train_tokenizer

SMALL = dict(train_prompts=600, heldout_prompts=104)
PAYS = VERIFIERS["number_or_exact"]
NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety"
)
VALUES = dict(zip(NAMES.split(), [*range(20), *range(20, 100, 10)], strict=True))


def words(question):
    return re.findall(r"[a-z]+", question.split(":")[1])


def numbers(question):
    return [int(n) for n in re.findall(r"\d+", question)]


def value(text):
    """Of number words up to 999: "two hundred sixty-five"."""
    total = 0
    for word in re.split(r"[ -]", text):
        total = total * 100 if word == "hundred" else total + VALUES[word]
    return total


DERIVED = {
    "number": lambda q, n: n[0],
    "word": lambda q, n: q.split()[-1],
    "repeat": lambda q, n: n[0],
    "copy": lambda q, n: " ".join(words(q)),
    "first": lambda q, n: words(q)[0],
    "second": lambda q, n: words(q)[1],
    "last": lambda q, n: words(q)[-1],
    "reverse": lambda q, n: ", ".join(reversed(words(q))),
    "capitals": lambda q, n: q.split(": ")[1].upper(),
    "count": lambda q, n: q.count(",") + 1,
    "smaller": lambda q, n: min(n),
    "largest": lambda q, n: max(n),
    "sort": lambda q, n: ", ".join(str(x) for x in sorted(n)),
    "even": lambda q, n: "even" if q[-1] in "02468" else "odd",
    "digits": lambda q, n: value(q.split(": ")[1]),
    "add": lambda q, n: n[0] + n[1],
    "add_two_digits": lambda q, n: n[0] + n[1],
    "multiply": lambda q, n: n[0] * n[1],
    "remainder": lambda q, n: n[0] - n[1] * (n[0] // n[1]),
    "unit": lambda q, n: f"{sum(n)} km",
    "buy": lambda q, n: sum(n),
    "boxes": lambda q, n: n[0] * n[1],
    "share": lambda q, n: next(x for x in range(99) if x * n[1] == n[0]),
    "buy_and_lose": lambda q, n: n[0] + n[1] - n[2],
    "boxes_and_lose": lambda q, n: n[0] * n[1] - n[2],
}


@pytest.fixture(scope="module")
def ladder():
    return load_task("ladder", **SMALL)


def tag(example, name):
    return dict(example.tags)[name]


def test_answers_follow_from_the_questions(ladder):
    for example in ladder.train + ladder.heldout:
        question, skill = example.prompt, tag(example, "skill")
        solved = [(question, example.answer, example.solution)]
        (_, q1), (_, s1), (_, q2), (_, s2) = example.context
        solved += [(q, s.rpartition("= ")[2], s) for q, s in ((q1, s1), (q2, s2))]
        for question, answer, solution in solved:
            if skill == "spell":
                assert value(answer) == numbers(question)[0]
            else:
                assert answer == str(DERIVED[skill](question, numbers(question)))
            for equation in solution.split(", ") if "=" in solution else ():
                left, right = equation.split(" = ")
                assert eval(left) == int(right)  # made of digits and + - * alone
        assert example.prompt not in (q1, q2) and solved[1][1] != solved[2][1]


def test_rewards_pay_right_answers_in_their_form(ladder):
    for example in ladder.train:
        answer = example.answer
        assert PAYS(example, example.solution) == PAYS(example, f" {answer}\n") == 1
        for wrong in ("", f"{answer} or 9999", f"{answer}1", answer[:-1]):
            assert PAYS(example, wrong) == 0
        said = PAYS(example, f"The answer is {answer}.")
        assert said == (tag(example, "skill") not in FORMS)
    assert {tag(e, "skill") for e in ladder.train if not e.answer.isdigit()} == FORMS


FORMS = {"copy", "first", "second", "word", "last", "reverse", "capitals", "sort"}
FORMS |= {"even", "spell", "unit"}


def test_parts_have_all_skills_and_no_prompt_twice(ladder):
    prompts = [e.prompt for e in ladder.train + ladder.heldout]
    assert len(set(prompts)) == 704
    for part in (ladder.train, ladder.heldout):
        counts = Counter(tag(e, "skill") for e in part)
        assert set(counts) == {skill.name for skill in SKILLS} == {*DERIVED, "spell"}
        assert max(counts.values()) - min(counts.values()) <= 1
    levels = {(str(skill.level), skill.name) for skill in SKILLS}
    assert {(tag(e, "level"), tag(e, "skill")) for e in ladder.train} == levels


def test_a_skill_with_few_questions_gives_way_to_the_others():
    task = load_task("ladder", skills=("add", "sort"))
    trained, heldout = (
        Counter(tag(e, "skill") for e in part) for part in (task.train, task.heldout)
    )
    assert trained["add"] + heldout["add"] == 81 - 2  # two of them are the examples
    assert trained.total() == 4096 and heldout.total() == 512
    assert heldout["add"] == pytest.approx(79 / 9, abs=1)
    alone = load_task("ladder", skills=("add",))
    assert (len(alone.train), len(alone.heldout)) == (71, 8)
    with pytest.raises(ConfigError, match="at most 79 together, .* got 592 "):
        load_task("ladder", skills=("add",), train_prompts=80)


def test_the_seed_decides_the_questions(ladder):
    again, other = (load_task("ladder", seed=s, **SMALL) for s in (0, 1))
    assert ladder.train == again.train and ladder.heldout == again.heldout
    assert {e.context for e in other.train} == {e.context for e in ladder.train}
    shared = {e.prompt for e in other.train} & {e.prompt for e in ladder.train}
    assert len(shared) < 300


def test_levels_and_skills_are_kept_or_refused():
    task = load_task("ladder", levels=(1, "8"), **SMALL)
    assert {tag(e, "level") for e in task.train + task.heldout} == {"1", "8"}
    for options, message in [
        (dict(levels=(1, 9)), "task.levels must be among 1, .*, 8, got 9"),
        (dict(skills=("sing",)), "task.skills must be among add, .* got sing"),
        (dict(levels=(8,), skills=("copy",)), "no skill of task.skills is of the"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_task("ladder", **options)


def test_prompts_and_completions_are_short(ladder):
    assert max(map(len, encode_prompts(ladder, ladder.train))) <= 160
    assert completion_tokens(ladder) <= 32


def test_without_a_chat_template_the_examples_are_lines_of_the_prompt():
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.chat_template = None
    task = load_task(
        "ladder",
        tokenizer=tokenizer,
        skills=("add",),
        train_prompts=9,
        heldout_prompts=1,
    )
    example = task.train[0]
    assert task.template == "none" and example.context == ()
    assert re.fullmatch(
        r"(Add: \d \+ \d\n\d \+ \d = \d+\n\n){2}Add: \d \+ \d\n", example.prompt
    )
    chat = load_task("ladder", skills=("add",), train_prompts=9, heldout_prompts=1)
    assert example.prompt.endswith(f"{chat.train[0].prompt}\n")
