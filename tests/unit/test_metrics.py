import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import ConfigError
from grpo_jax.runs.fields import FIELDS
from grpo_jax.runs.lines import JsonLines, keep_until, read_lines, to_numbers
from grpo_jax.runs.paths import cache_directory, count_compiles, use_compile_cache


def written(path, rows):
    lines = JsonLines(path)
    for row in rows:
        lines.write(row)
    lines.close()
    return path


def test_lines_come_back_and_are_appended_to(tmp_path):
    path = written(tmp_path / "m.jsonl", [{"step": 0}, {"step": 1, "x": None}])
    written(path, [{"step": 2}])
    assert read_lines(path) == [{"step": 0}, {"step": 1, "x": None}, {"step": 2}]
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 0, "text": "é\u2028"})
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 0, "text": "é\u2028"}]
    lines.close()


def test_what_json_cannot_say_is_null(tmp_path):
    row = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}}
    path = written(tmp_path / "m.jsonl", [row])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": None},
    }


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = written(tmp_path / "m.jsonl", [{"step": 0}, {"step": 1}])
    path.write_text(path.read_text()[:-5])
    assert read_lines(path) == [{"step": 0}]


def test_a_broken_line_elsewhere_is_an_error(tmp_path):
    (path := tmp_path / "m.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_lines(path)


def test_keep_until_drops_later_steps_and_the_cut_line(tmp_path):
    path = written(tmp_path / "m.jsonl", [{"step": s, "x": 0.1} for s in range(5)])
    with path.open("a") as file:
        file.write('{"step": 5, "x"')
    keep_until(path, 2)
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2]
    written(path, [{"step": 3}])
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_to_numbers():
    metrics = {"a": jnp.float32(0.5), "b": jnp.int32(3), "c": np.float64(2), "d": 2}
    actual = to_numbers(metrics | {"e": jnp.float32(jnp.nan)})
    assert np.isnan(actual.pop("e"))
    assert actual == {"a": 0.5, "b": 3, "c": 2.0, "d": 2}
    assert [type(x) for x in actual.values()] == [float, int, float, int]


def test_every_field_is_a_noun_and_is_documented():
    assert {"step", "reward/mean", "group/informative", "group/std_mean"} <= set(FIELDS)
    assert {"mismatch/max_abs", "tokens/completion"} <= set(FIELDS)
    assert {"eval/train_pass_rate", "eval/heldout_pass_rate"} <= set(FIELDS)
    assert {f"time/{phase}_s" for phase in ("sample", "score", "update")} <= set(FIELDS)
    assert all(FIELDS.values()) and all(len(text) > 8 for text in FIELDS.values())


def test_count_compiles_counts_new_programs_only():
    compiles = count_compiles()
    function = jax.jit(lambda x: x * 3 + 1)
    function(np.float32(1))
    once = compiles()
    function(np.float32(2))
    assert once >= 1 and compiles() == once
    function(np.zeros(7, np.float32))
    assert compiles() > once


@pytest.fixture
def no_cache_yet():
    """jax without a directory for compiled programs."""
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    jax.config.update(name, None)
    yield
    jax.config.update(name, before)


# A file in place of a directory: not even root can write below it.
def test_a_cache_that_cannot_be_written_is_said_and_left_out(
    tmp_path, monkeypatch, no_cache_yet
):
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("GRPO_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    said = []
    use_compile_cache(said.append)
    assert len(said) == 1 and f"{tmp_path / 'home'}/.cache" in said[0]
    assert "GRPO_JAX_CACHE" in said[0] and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "cache"))
    use_compile_cache(said.append)
    assert len(said) == 1 and (tmp_path / "cache" / "compiled").is_dir()


def test_without_a_home_directory_the_cache_is_asked_for(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRPO_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", unknown)
    with pytest.raises(ConfigError, match="set HOME or GRPO_JAX_CACHE"):
        cache_directory()
