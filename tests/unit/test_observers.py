"""What is said before an evaluation or a measurement, and what it took."""

import contextlib
import time
from types import SimpleNamespace

import pytest

from grpo_jax.training.observers import ANNOUNCED_S, Observers


def due(*, measured_from):
    return SimpleNamespace(
        evaluation=lambda step: True, measurement=lambda step: step >= measured_from
    )


@pytest.fixture
def made(monkeypatch):
    """what is due -> (observers, what they said and showed, seconds of each thing)."""
    now, seconds = [0.0], {"evaluation": 1.0, "measurement": 1.0}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(name):
        def measure(params, step):
            now[0] += seconds[name]
            return {name: step}

        return measure

    def make(what):
        said = []
        instrument = SimpleNamespace(
            measure=takes("measurement"),
            compile=lambda params: None,
            discard=lambda: None,
            pending=None,
        )
        observers = Observers(
            what,
            SimpleNamespace(measure=takes("evaluation")),
            instrument,
            None,
            SimpleNamespace(show=lambda: said.append("shown")),
            SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
            SimpleNamespace(stopping=False),
            said.append,
        )
        return observers, said, seconds

    return make


def test_what_took_long_is_announced_after_its_steps_line(made):
    observers, said, seconds = made(due(measured_from=0))
    observers.prepare(None, 0, keep_measurement=True)
    assert [text.split(" (")[0] for text in said] == [
        "evaluating the start", "measuring the start",
    ]  # fmt: skip
    said.clear()
    seconds["evaluation"] = ANNOUNCED_S + 1
    metrics = observers.observe(None, 1)
    assert said == []  # the last ones took a second
    assert metrics["time/evaluation_s"] == seconds["evaluation"]
    observers.observe(None, 2)
    assert said == ["shown", "step 2: evaluating"]


def test_a_first_measurement_in_the_middle_is_said_to_compile(made):
    observers, said, _ = made(due(measured_from=1))
    metrics = observers.prepare(None, 0, keep_measurement=False)
    assert "measurement" not in metrics and len(said) == 1
    said.clear()
    assert observers.observe(None, 1)["measurement"] == 1
    assert said == ["shown", "step 1: measuring (compiles its programs)"]
    said.clear()
    observers.observe(None, 2)
    assert said == []
