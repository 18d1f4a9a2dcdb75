import dataclasses
import json

import chex
import numpy as np
import pytest

from grpo_jax import TrainConfig, load_task
from grpo_jax.errors import ConfigError
from grpo_jax.evaluation.exact import token_loss
from grpo_jax.parallel.processes import Processes
from grpo_jax.planning.plan import make_plan
from grpo_jax.planning.resolve import warm_start_settings
from grpo_jax.rewards.types import Example
from grpo_jax.rollouts.demonstrations import Demonstrations
from grpo_jax.runs.config import SamplingConfig, WarmStartConfig
from grpo_jax.training.warm_start import warm_start
from tests.helpers import tiny_policy

FEW = WarmStartConfig(max_steps=50, batch_size=8, learning_rate=0.01)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Additions with the sum worked out; every tenth one at great length."""
    rows = [
        {
            "prompt": f"{a} + {b}?",
            "answer": a + b,
            "how": f"{a} + {b} = {a + b}" + " or so" * 30 * (a == 9),
        }
        for a in range(10)
        for b in range(10)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(
        "jsonl", path=str(path), solution_field="how", rewards=("gsm8k",),
        vocab_size=280, heldout_prompts=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def long(task):
    count = sum("or so" in e.solution for e in task.train)
    assert 0 < count < 12
    return count


def start(task, cache, *, config=FEW, length=14, said=None):
    policy = tiny_policy(vocab_size=len(task.tokenizer))
    result = warm_start(
        policy, task, warm_start_settings(config, task), seed=0, prompt_length=32,
        length=length, temperature=1.0, cache=cache,
        report=lambda *x: said.append(x) if said is not None else None,
        warn=pytest.fail, processes=Processes(),
    )  # fmt: skip
    return policy, result


@pytest.mark.slow
def test_worked_solutions_are_imitated_for_a_number_of_steps(task, long, tmp_path):
    said = []
    policy, result = start(task, tmp_path, said=said)
    assert result.steps == 50 and result.reached and not result.cached
    assert result.pass_rate is None and result.left_out == long
    shown = Demonstrations(task, task.warm_start, 32, 14)
    aside = shown.set_aside(np.random.default_rng([0, 6]))
    before, after = (token_loss(p, aside) for p in (policy, result.policy))
    assert after < before - 1 and result.loss == pytest.approx(after, abs=1e-5)
    assert said[-1] == ("clean answers", 50, f"nats a token {result.loss:.3f}")
    text = f"{result.loss:.3f} nats a token on solutions set aside, {long} too long"
    assert str(result).startswith(text)
    again = start(task, tmp_path)[1]
    assert again.cached and again[1:5] == result[1:5]
    # Room for longer solutions is another result, not the cached one.
    assert not start(
        task, tmp_path, length=15, config=dataclasses.replace(FEW, max_steps=1)
    )[1].cached


# Mean over all tokens, by hand from the log-probs of one row at a time.
def test_token_loss_does_not_depend_on_how_it_is_cut(task):
    policy = tiny_policy(vocab_size=len(task.tokenizer))
    shown = Demonstrations(task, task.warm_start, 32, 14)
    rows = shown.set_aside(np.random.default_rng(1))
    whole, cut = token_loss(policy, rows), token_loss(policy, rows, budget=40)
    assert cut == pytest.approx(whole, rel=1e-5) and 3 < whole < 12


def test_batches_show_no_solution_set_aside_and_none_too_long(task, long):
    shown = Demonstrations(task, task.warm_start, 32, 14)
    aside = shown.set_aside(np.random.default_rng(0))
    kept = {tuple(row[row > 0]) for row in aside.prompts}
    assert len(kept) == 8  # a tenth of 80
    rng, seen = np.random.default_rng(1), set()
    for _ in range(20):
        batch = shown.batch(rng, False)
        chex.assert_shape(batch.prompts, (32, 32))
        chex.assert_shape(batch.completions, (32, 1, 14))
        assert (batch.completion_mask[:, 0, 0] == 1).all()
        seen |= {tuple(row[row > 0]) for row in batch.prompts}
    assert kept.isdisjoint(seen) and len(seen) == 80 - 8 - long


def test_one_demonstration_is_enough(task):
    one = dataclasses.replace(
        task,
        train=task.train[:1],
        warm_start=dataclasses.replace(
            task.warm_start, demonstrations=lambda rng, n, spoiled: task.train[:1] * n
        ),
    )
    shown = Demonstrations(one, one.warm_start, 32, 400)
    assert len(shown.set_aside(np.random.default_rng(0)).prompts) == 1
    assert len(shown.batch(np.random.default_rng(0), False).prompts) == 32


def test_where_nothing_fits_the_way_out_is_named(task, tmp_path):
    message = "every solution of task jsonl is longer than 3 tokens, .* raise max_new"
    with pytest.raises(ConfigError, match=message):
        start(task, tmp_path, length=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_pass_rate": 0.5}, "needs a task with one right completion, and json"),
        ({"noisy_steps": 5}, "changes nothing: task jsonl has no spoiled answers"),
    ],
)
def test_settings_that_a_task_cannot_have(task, setting, message):
    config = WarmStartConfig(**setting)
    with pytest.raises(ConfigError, match=message):
        warm_start_settings(config, task)
    with pytest.raises(ConfigError, match=message):
        make_plan(TrainConfig(warm_start=config), task)


# 80 solutions: room for the 80th is for all, and 99 in 100 of 80 are 80; of 200 the two
# longest do not count.
def test_completions_have_room_for_99_in_100_solutions(task):
    def planned(lengths, **sampling):
        train = [Example(f"{i}?", "1", "x" * n) for i, n in enumerate(lengths)]
        few = dataclasses.replace(task, train=train)
        config = TrainConfig(sampling=SamplingConfig(**sampling))
        plan = make_plan(config, few)
        return plan.max_new_tokens, plan.answer_tokens

    assert planned([3] * 198 + [50, 60]) == (4, 4)  # the EOS included
    assert planned([3] * 196 + [40, 50, 50, 60]) == (51, 51)
    assert planned([3] * 79 + [60]) == (61, 61)
    assert planned([3] * 79 + [60], max_new_tokens=8) == (8, 8)
