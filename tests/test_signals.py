"""A polite stop: the first signal is noted, a second Ctrl-C ends the process at once."""

import signal
import subprocess
import sys
import time

import pytest

CODE = """
import time
from sovit.signals import stop_on_signal
with stop_on_signal() as should_stop:
    print("ready", flush=True)
    while not should_stop():
        time.sleep(0.001)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_second_interrupt_ends(first):
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == b"asked\n"
    process.send_signal(signal.SIGTERM)  # the launcher's, after a cluster's own: not to be taken for impatience
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT


def test_handlers_are_put_back():
    from sovit.signals import stop_on_signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGTERM)
        assert should_stop()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_command_can_be_typed_again():
    code = "from sovit.signals import this_command; print(this_command())"
    done = subprocess.run([sys.executable, "-c", code, "a b"], capture_output=True, text=True, check=True)
    again = subprocess.run(done.stdout, shell=True, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
