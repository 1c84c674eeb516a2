import os
import signal
import threading

import pytest

from dppo.stopping import Stop, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_leaves_a_note(number, capfd):
    with Stop() as stop:
        stop.check("nothing yet")
        send(number)
        assert stop.asked == number
        with pytest.raises(Stopped, match=f"^stopped by {number.name}; all is saved$") as caught:
            stop.check("all is saved")
    assert caught.value.status == 128 + number
    assert f"{number.name}: stopping when this step is done" in capfd.readouterr().err


def test_a_second_interruption_is_one_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), Stop():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_afterwards_signals_mean_what_they_meant():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_are_left_alone():
    found = []

    def look() -> None:
        with Stop() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [None]
