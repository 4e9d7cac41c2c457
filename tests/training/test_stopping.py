"""Signals are noted while a run is open, then handled as before, but for a process that has lost another."""

import os
import signal

import pytest

from helmholtz.training.distributed import LostRankError
from helmholtz.training.stopping import SIGNALS, stop_signals


@pytest.fixture(autouse=True)
def before(heard_hangups):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield handlers
    for number, handler in handlers.items():
        signal.signal(number, handler)


def now(handlers):
    return {number: signal.getsignal(number) for number in handlers}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_the_handlers_come_back(before, number):
    with stop_signals() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        assert signal.getsignal(number) == before[number], "a second one ends the process"
    assert now(before) == before
    with pytest.raises(RuntimeError), stop_signals():
        raise RuntimeError("any other error")
    assert now(before) == before


def test_a_process_that_lost_another_is_not_ended_before_it_has_said_so(before):
    with pytest.raises(LostRankError), stop_signals() as received:
        raise LostRankError("rank 0 of 2 lost another rank")
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]


def test_a_hang_up_that_nohup_ignores_stays_ignored(before):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
