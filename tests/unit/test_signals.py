"""Which signals ask a run to save and end."""

import os
import signal

import pytest

from grpo_jax.training.signals import StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def dispositions():
    """Those of this test alone: a background job's SIGINT is ignored to begin with."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_to_stop(number, capfd):
    with StopSignals() as signals:
        assert not signals.received
        os.kill(os.getpid(), number)
        assert signals.received
        assert "then the run is saved" in capfd.readouterr().err  # at once
        assert signal.getsignal(number) is signal.SIG_DFL  # the next one ends it
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize("ignored", SIGNALS)
def test_what_the_process_was_started_to_ignore_stays_ignored(ignored):
    [other] = set(SIGNALS) - {ignored}
    signal.signal(ignored, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), ignored)
        assert not signals.received
        os.kill(os.getpid(), other)
        assert signals.received
        assert signal.getsignal(ignored) is signal.SIG_IGN
    assert signal.getsignal(ignored) is signal.SIG_IGN
