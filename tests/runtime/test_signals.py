"""Signals that ask a job to stop: in a process of its own, since signals belong to processes."""

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from distributed_adaround.errors import StoppedError
from distributed_adaround.runtime.signals import SIGNALS, StopRequest

HEADER = """
    import os, signal, sys, threading
    from distributed_adaround.errors import StoppedError
    from distributed_adaround.runtime.signals import StopRequest
    stop = StopRequest()
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    whole = textwrap.dedent(HEADER) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=600, check=False)


def test_signals_are_those_of_schedulers_and_none_of_nccl() -> None:
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR2}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_the_first_signal_raises_where_there_is_nothing_to_save(name: str) -> None:
    ended = run(f"""
        with stop.listening():
            try:
                os.kill(os.getpid(), signal.{name})
                threading.Event().wait()
            except StoppedError as error:
                print(error)
    """)
    assert (ended.returncode, ended.stdout) == (0, "stopped by a signal; start the job again to go on\n"), ended.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_deferred_the_first_signal_is_only_noted(name: str) -> None:
    ended = run(f"""
        with stop.listening(), stop.deferred():
            assert not stop.requested
            os.kill(os.getpid(), signal.{name})
            while not stop.requested:
                pass
            print("saved")
    """)
    assert (ended.returncode, ended.stdout) == (0, "saved\n"), ended.stderr


def test_a_second_signal_ends_at_once_even_inside_a_call_that_does_not_return() -> None:
    """A lock held by nobody stands for a collective whose peers are gone: Python's own handlers would wait for it."""
    ended = run("""
        import ctypes
        from distributed_adaround.runtime import signals as stopping
        stopping.ECHO_SECONDS = 0
        with stop.listening(), stop.deferred():
            def ask():
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop.requested:
                    pass
                os.kill(os.getpid(), signal.SIGUSR2)
            threading.Thread(target=ask, daemon=True).start()
            ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))
            while True:
                ctypes.CDLL(None).pause()
    """)
    assert ended.returncode == 75, ended.stderr


def test_signals_that_come_together_count_as_one() -> None:
    """Slurm signals ranks and torchrun, which signals the ranks again."""
    ended = run("""
        from distributed_adaround.runtime import signals as stopping
        stopping.ECHO_SECONDS = 3600
        with stop.listening(), stop.deferred():
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
            while not stop.requested:
                pass
            print("saved")
        print("ended by itself")
    """)
    assert (ended.returncode, ended.stdout) == (0, "saved\nended by itself\n"), ended.stderr


def test_afterwards_signals_are_as_before() -> None:
    ended = run("""
        signal.signal(signal.SIGUSR2, lambda *_: print("mine"))
        before = threading.active_count()
        with stop.listening():
            pass
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    """)
    assert (ended.returncode, ended.stdout) == (0, "mine\n"), ended.stderr


def test_the_thread_ends() -> None:
    before = threading.active_count()
    with StopRequest().listening():
        assert threading.active_count() == before + 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.endswith("(_count)"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_stopped_job_is_to_be_started_again() -> None:
    assert StoppedError().exit_code == 75
