"""The numbers of the streams: an old run resumes exactly only while these hold."""

import jax
import numpy as np
import pytest

from grpo_jax.streams import RunKeys, Stream, host_rng, run_keys

# name, number and more -> default_rng([17, number, *more]).integers(10**9, size=2).
HOST = [
    ("PUZZLES", (0,), [740963724, 845074792]),
    ("DATA_PARTS", (1,), [156203357, 655462358]),
    ("WARM_START_BATCHES", (2,), [805614635, 613180618]),
    ("EVALUATED_PROMPTS", (3,), [270797698, 411031300]),
    ("PROMPT_ORDER", (4, 2), [444484039, 858013359]),
    ("REFILLS", (5, 3, 1), [702495197, 640993897]),
    ("WARM_START_SET_ASIDE", (6,), [673809959, 105824224]),
    ("EVAL_COMMAND_PROMPTS", (7,), [208647931, 161714408]),
]
# name -> data of fold_in(key(17), position), threefry2x32.
KEYS = {
    "init": [1410583977, 344060510],
    "samples": [677216225, 3396477011],
    "evaluation": [853908896, 4142250837],
    "drafts": [460981195, 1144372815],
    "refills": [2649849308, 548698658],
    "probe": [2830441508, 3956492300],
    "lora": [2831615983, 3239506553],
}


def test_streams_are_these_and_no_others():
    assert {s.name: s.value for s in Stream} == {name: n[0] for name, n, _ in HOST}
    assert RunKeys._fields == tuple(KEYS)


@pytest.mark.parametrize(("name", "numbers", "draws"), HOST, ids=[h[0] for h in HOST])
def test_host_stream(name, numbers, draws):
    rng = host_rng(17, Stream[name], *numbers[1:])
    assert rng.integers(10**9, size=2).tolist() == draws
    same = np.random.default_rng([17, *numbers])
    np.testing.assert_array_equal(
        host_rng(17, Stream[name], *numbers[1:]).random(5), same.random(5)
    )


@pytest.mark.parametrize(("number", "name"), [*enumerate(KEYS)])
def test_run_key(number, name):
    key = getattr(run_keys(17), name)
    assert jax.random.key_data(key).tolist() == KEYS[name]
    assert key == jax.random.fold_in(jax.random.key(17), number)
