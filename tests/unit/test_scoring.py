import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import grpo_jax as gj
from grpo_jax import Example
from grpo_jax.errors import ConfigError
from grpo_jax.rewards.pool import VerifierPool, verifier_pool
from grpo_jax.rewards.scoring import score
from grpo_jax.rewards.types import Reward
from grpo_jax.rewards.verifiers import exact
from grpo_jax.runs.config import ScoringConfig

EXAMPLES = [Example("1+1=", "2"), Example("2+1=", "3")]


def test_rewards_are_prompts_by_group():
    scores = score(exact, EXAMPLES, [["2", "3", ""], ["3", "3", "2"]])
    np.testing.assert_array_equal(scores.rewards, [[1, 0, 0], [1, 1, 0]])
    assert scores.rewards.dtype == np.float32 and scores.errors == []


def test_the_reward_sees_the_example_and_the_text():
    seen = []
    score(lambda *call: seen.append(call) or 0.0, EXAMPLES, [["a"], ["b"]])
    assert seen == [(EXAMPLES[0], "a"), (EXAMPLES[1], "b")]


def test_a_reward_that_raises_is_missing_and_told():
    def reward(example, completion):
        return 1 / len(completion)

    scores = score(reward, EXAMPLES, [["xx", ""], ["", "x"]])
    np.testing.assert_array_equal(scores.rewards, [[0.5, np.nan], [np.nan, 1]])
    assert scores.errors == ["ZeroDivisionError: division by zero"] * 2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e39, np.float64(-1e39)])
def test_a_reward_that_is_not_finite_in_float32_is_missing_and_told(value):
    scores = score(lambda e, c: value if c else 1.0, EXAMPLES[:1], [["x", ""]])
    np.testing.assert_array_equal(scores.rewards, [[np.nan, 1]])
    assert len(scores.errors) == 1


@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0], {}, 1j, object()])
def test_a_reward_that_is_no_number_is_missing_and_told(value):
    scores = score(lambda e, c: value if c else 1.0, EXAMPLES[:1], [["x", ""]])
    np.testing.assert_array_equal(scores.rewards, [[np.nan, 1]])
    assert len(scores.errors) == 1 and "Error" in scores.errors[0]


@pytest.mark.parametrize("value", [True, 1, np.float64(1), np.int32(1), np.bool_(1)])
def test_any_kind_of_number_will_do(value):
    assert score(lambda e, c: value, EXAMPLES[:1], [["x"]]).rewards.tolist() == [[1.0]]


def test_an_interrupt_is_not_swallowed():
    def interrupted(example, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, EXAMPLES[:1], [["x"]])


def test_examples_and_completions_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        score(exact, EXAMPLES, [["2"]])


def test_what_a_plain_function_solves_is_a_reward_of_one():
    scores = score(lambda e, c: float(c), EXAMPLES[:1], [["1", "0.5", "2", "nan"]])
    assert scores.solved.tolist() == [[True, False, True, False]]
    assert scores.parts == {} and scores.failures == 0


# ---- rewards by name, in worker processes ----

MATH, EXACT = Reward(name="math"), Reward(name="exact")
TOWER = r"\boxed{9^{9^{9^9}}}"
OWN = """
import os, subprocess, sys, time

def ok(example, completion):
    return len(completion) / 10

def sees(example, completion):
    print("\\n{\\"value\\": 9}", flush=True)
    os.system("echo 9")
    assert example.tags == (("level", "3"),) and example.solution == "worked"
    return float(example.prompt == "1+1=")

def misbehaves(example, completion):
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        os._exit(0)
    if completion == "fork":
        if os.fork():
            os._exit(0)
        time.sleep(60)
    if completion == "memory":
        return len(bytearray(4 << 30))
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "nan":
        return float("nan")
    if completion == "words":
        return "good"
    if completion == "none":
        return None
    if completion.startswith("wait "):
        with open(completion[5:], "w") as file:
            file.write(f"{os.getpid()}.")
        time.sleep(60)
    if completion.startswith("child "):
        child = subprocess.Popen(["sleep", "60"], stdout=sys.stderr)
        with open(completion[6:], "w") as file:
            file.write(str(child.pid))
        time.sleep(60)
    return 1.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def math_pool():
    with VerifierPool([MATH, EXACT], workers=2, timeout=0.5) as pool:
        yield pool


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_rewards_by_name_are_weighted_and_told_apart(own):
    rewards = (
        MATH,
        Reward(name="length", weight=0.5, options=(("start", 10), ("end", 20))),
        Reward(name="own_rewards:ok", weight=-1.0),
    )
    completions = [[r"\boxed{2}", r"\boxed{3}"], [r"\boxed{6/2}", "?"]]
    scores = score(rewards, EXAMPLES, completions, tokens=np.array([[10, 15], [20, 0]]))
    # length: 0, -1/2, -1, 0; own: 9, 9, 11 and 1 characters, in tenths.
    np.testing.assert_allclose(
        scores.rewards, [[1 - 0.9, -0.25 - 0.9], [1 - 0.5 - 1.1, -0.1]], rtol=1e-6
    )
    assert scores.solved.tolist() == [[True, False], [True, False]]
    assert list(scores.parts) == [
        "math",
        "length(start=10,end=20)",
        "own_rewards:ok",
    ]
    np.testing.assert_array_equal(scores.parts["math"], [[1, 0], [1, 0]])
    assert scores.rewards.dtype == np.float32
    assert scores.errors == [] and scores.failures == 0


def test_the_length_needs_the_counts(math_pool):
    reward = Reward(name="length", options=(("start", 1), ("end", 2)))
    with pytest.raises(ValueError, match="tokens must be given"):
        score((reward,), EXAMPLES[:1], [["a"]], pool=math_pool)


def test_a_hang_costs_its_timeout_and_nothing_else(math_pool):
    before = set(math_pool.pids)
    group = [TOWER, r"\boxed{2}", r"\boxed{1+1}", TOWER, r"\boxed{4/2}", r"\boxed{3}"]
    start = time.monotonic()
    scores = score((MATH,), EXAMPLES[:1], [group], pool=math_pool)
    assert time.monotonic() - start < 4  # asked once: 0.5 s, and a restart
    assert scores.rewards.tolist() == [[0, 1, 1, 0, 1, 0]]
    assert scores.failures == 2 and scores.errors == []
    again = score((MATH,), EXAMPLES[:1], [[r"\boxed{2^1}"]], pool=math_pool)
    assert again.rewards.tolist() == [[1]] and again.failures == 0
    assert gone(before - set(math_pool.pids))


HOSTILE = {
    "unterminated": r"\boxed{2",
    "brackets": r"\boxed{" + "[" * 1900 + "2" + "]" * 1900 + "}",
    "parentheses": r"\boxed{" + "(" * 10 + "2" + ")" * 10 + "+1}",
    "digits": r"\boxed{" + "9" * 100_000 + "}",
    "code": r"\boxed{__import__('os').system('echo 2')}",
    "code in text": r"\boxed{\text{__import__('os').system('echo 2')}}",
    "null": "\\boxed{2\0}",
    "right to left": "\\boxed{\u202e2}",
    "surrogate": "\\boxed{\ud8002}",
    "sum": r"\boxed{\sum_{n=1}^{10^9} 1/n}",
    "long": "a" * 10_000_000 + r"\boxed{3}",
    "boxes": r"\boxed{" * 1_000_000,
}


def test_hostile_completions_are_wrong_and_the_next_is_right(math_pool):
    group = list(HOSTILE.values())
    start = time.monotonic()
    scores = score((MATH,), EXAMPLES[:1], [[*group, r"\boxed{+2}"]], pool=math_pool)
    assert time.monotonic() - start < 0.5 * len(group)
    assert scores.rewards[0, :-1].tolist() == [0] * len(group)
    assert scores.rewards[0, -1] == 1 and scores.errors == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "10^{10^{10}}",
        "999999999999999!",
        "7^{99999999}",
        r"\binom{1000000000}{500000000}",
        "(x+y+z)^{300}",
        r"\sin(\sin(10^{100000000}))",
    ],
)
def test_what_sympy_would_never_finish(math_pool, answer):
    start = time.monotonic()
    scores = score((MATH,), EXAMPLES[:1], [[f"\\boxed{{{answer}}}"]], pool=math_pool)
    assert time.monotonic() - start < 4
    assert scores.rewards.tolist() == [[0]]
    right = score((MATH,), EXAMPLES[:1], [[rf"\boxed{{2}}{answer}"]], pool=math_pool)
    assert right.rewards.tolist() == [[1]] and right.failures == 0


MISBEHAVES = Reward(name="own_rewards:misbehaves")


def test_a_worker_killed_from_outside_costs_its_check_only(own, tmp_path):
    file = tmp_path / "pid"

    def kill():
        while not (file.exists() and file.read_text().endswith(".")):
            time.sleep(0.01)
        os.kill(int(file.read_text()[:-1]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    group = ["fine"] * 20 + [f"wait {file}"] + ["fine"] * 20
    with VerifierPool([MISBEHAVES], workers=2, timeout=10) as pool:
        scores = score((MISBEHAVES,), EXAMPLES[:1], [group], pool=pool)
    thread.join()
    assert scores.rewards.tolist() == [[1] * 20 + [0] + [1] * 20]
    assert scores.failures == 1 and scores.errors == []


def test_a_function_of_the_users_may_misbehave(own):
    group = ["hang", "exit", "memory", "raise", "nan", "words", "none", "fine"]
    with VerifierPool([MISBEHAVES], workers=2, timeout=0.5, memory_gib=1) as pool:
        scores = score((MISBEHAVES,), EXAMPLES[:1], [group], pool=pool)
    missing = np.nan
    np.testing.assert_array_equal(
        scores.rewards, [[0, 0, 0, missing, missing, missing, missing, 1]]
    )
    assert scores.failures == 3
    assert scores.errors[0] == "KeyError: 'no such thing'"
    assert scores.errors[1] == "the reward is nan" and len(scores.errors) == 4


def test_a_function_of_the_users_sees_the_example_and_may_print(own):
    examples = [Example("1+1=", "2", "worked", (("level", "3"),))]
    scores = score((Reward(name="own_rewards:sees"),), examples, [["x", "y"]])
    assert scores.rewards.tolist() == [[1, 1]] and scores.errors == []


def test_a_kill_takes_the_grandchildren(own, tmp_path):
    file = tmp_path / "pid"
    with VerifierPool([MISBEHAVES], workers=1, timeout=0.5) as pool:
        scores = score((MISBEHAVES,), EXAMPLES[:1], [[f"child {file}"]], pool=pool)
    assert scores.failures == 1
    assert gone([int(file.read_text())])


def test_an_exit_is_seen_while_a_fork_holds_the_pipe(own):
    start = time.monotonic()
    with VerifierPool([MISBEHAVES], workers=1, timeout=30) as pool:
        scores = score((MISBEHAVES,), EXAMPLES[:1], [["fork", "fine"]], pool=pool)
    assert scores.rewards.tolist() == [[0, 1]] and scores.failures == 1
    assert time.monotonic() - start < 5


def test_a_worker_that_died_while_idle_costs_nothing():
    with VerifierPool([EXACT], workers=2) as pool:
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        assert gone(pool.pids)
        scores = score((EXACT,), EXAMPLES[:1], [["2", "3"]], pool=pool)
    assert scores.rewards.tolist() == [[1, 0]] and scores.failures == 0


def test_closing_leaves_no_process_and_no_later_use():
    with VerifierPool([EXACT], workers=2) as pool:
        pids = pool.pids
        assert len(pids) == 2 and all(map(alive, pids))
    assert gone(pids)
    with pytest.raises(ValueError, match="the pool must be open"):
        score((EXACT,), EXAMPLES[:1], [["2"]], pool=pool)


def test_an_interrupt_leaves_a_pool_that_answers_right(own, tmp_path):
    # In the background of a script SIGINT is ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with VerifierPool([MISBEHAVES], workers=1, timeout=30) as pool:
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                score((MISBEHAVES,), EXAMPLES[:1], [["hang"]], pool=pool)
            scores = score((MISBEHAVES,), EXAMPLES[:1], [["fine"]], pool=pool)
    finally:
        signal.signal(signal.SIGINT, before)
    assert scores.rewards.tolist() == [[1]]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux")
def test_workers_die_with_a_parent_that_is_killed(own, tmp_path):
    code = (
        "from grpo_jax.rewards.pool import VerifierPool\n"
        "from grpo_jax.rewards.scoring import score\n"
        "from grpo_jax.rewards.types import Example, Reward\n"
        "reward = Reward(name='own_rewards:misbehaves')\n"
        "pool = VerifierPool([reward], timeout=60)\n"
        "print(*pool.pids, flush=True)\n"
        "score((reward,), [Example('', '')], [['hang', 'hang']], pool=pool)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.2)  # until both sleep in the user's function
    parent.kill()
    parent.communicate()
    assert len(pids) == 2 and gone(pids)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("own_rewards:no_such", "no attribute 'no_such'"),
        ("broken:f", "ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_told_at_once(own, tmp_path, name, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=message):
        VerifierPool([Reward(name=name)])


def test_a_worker_that_never_starts_is_no_endless_loop(own, tmp_path):
    (tmp_path / "dies.py").write_text("import os; os._exit(3)")
    with pytest.raises(RuntimeError, match="3 in a row died.*status 3"):
        VerifierPool([Reward(name="dies:f")], workers=1)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout": 0}, {"memory_gib": -1}])
def test_what_a_pool_must_be_given(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be more than 0"):
        VerifierPool([EXACT], **bad)
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        VerifierPool([Reward(name="maths")])


def test_verify_is_the_verdict_of_training():
    assert gj.verify("math", "0.5", r"\boxed{\frac{1}{2}}") == 1
    assert gj.verify("math", "0.5", r"\boxed{\frac{1}{2}") == 0
    assert gj.verify("gsm8k", "24", "#### 24.0") == 1
    assert (
        gj.verify("gsm8k", 24, "#### 24.0")
        == gj.verify("math", 1e-7, r"\boxed{10^{-7}}")
        == 1
    )
    assert gj.verify("chains", "5", "5") == 1 and gj.verify("chains", "5", "5 ") == 0
    with pytest.raises(
        ConfigError, match="gold must be text or a finite number, got n"
    ):
        gj.verify("gsm8k", float("nan"), "5")
    assert gj.verify("countdown", "7 from 3 4", "<answer>3+4</answer>") == 1
    assert gj.verify("ladder", "7 km", "7 km") == gj.verify("ladder", 7, "3 + 4 = 7")
    assert gj.verify("ladder", "7 km", "7") == 0 and gj.verify("ladder", 7, "7") == 1
    with pytest.raises(ConfigError, match="task to verify.*did you mean 'gsm8k'"):
        gj.verify("gsm9k", "", "")


PEEKS = Reward(name="peeks:f")


@pytest.fixture
def peeks(own, tmp_path, monkeypatch):
    """A reward that counts the characters of two variables of this process."""
    (tmp_path / "peeks.py").write_text(
        "import os\n"
        "def f(e, c):\n"
        "    return float(sum(len(os.environ.get(n, '')) for n in ('KEY_A', 'KEY_B')))"
    )
    monkeypatch.setenv("KEY_A", "secret")
    monkeypatch.setenv("KEY_B", "1234567890")


@pytest.mark.parametrize(
    ("names", "expected"), [((), 0), (("KEY_A",), 6), (("KEY_A", "KEY_B"), 16)]
)
def test_workers_get_the_variables_that_are_named(peeks, names, expected):
    limits = ScoringConfig(workers=1, environment=names)
    with verifier_pool([PEEKS], limits) as pool:
        scores = score([PEEKS], EXAMPLES[:1], [["x"]], pool=pool)
    assert scores.rewards.tolist() == [[expected]]


def test_a_call_without_a_pool_has_the_variables_of_this_process(peeks, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # not the workers': they use the CPU
    assert score([PEEKS], EXAMPLES[:1], [["x"]]).rewards.tolist() == [[16]]
    scores = score([PEEKS], EXAMPLES[:1], [["x"]], environment=["KEY_B"])
    assert scores.rewards.tolist() == [[10]]


def test_a_variable_that_is_not_set_is_named(peeks, monkeypatch):
    monkeypatch.delenv("KEY_B")
    with pytest.raises(ConfigError, match="variable KEY_B, which is not set"):
        VerifierPool([PEEKS], environment=("KEY_A", "KEY_B"))


def test_failures_are_counted_by_sample(own):
    group, rewards = ["hang", "fine", "exit"], (MISBEHAVES, EXACT)
    with VerifierPool(rewards, workers=2, timeout=0.5) as pool:
        scores = score(rewards, EXAMPLES[:1], [group], pool=pool)
    assert scores.failed.tolist() == [[1, 0, 1]] and scores.failures == 2


def test_of_several_rewards_the_one_that_raised_is_named(own):
    scores = score((EXACT, MISBEHAVES), EXAMPLES[:1], [["raise"]])
    assert scores.errors == ["own_rewards:misbehaves: KeyError: 'no such thing'"]
