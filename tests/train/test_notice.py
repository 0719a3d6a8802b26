"""The words to rank 0, and whether there is a rank 0 to hear them."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import ray

from langcell.errors import Interrupted
from langcell.recipes.stopping import Stopping
from langcell.train.notice import Listener, make_notice, stop


def heard(listener: Listener, word: str) -> bool:
    deadline = time.monotonic() + 20
    while word not in listener.heard and time.monotonic() < deadline:
        time.sleep(0.01)
    return word in listener.heard


def test_words_arrive_and_are_answered(ray_session: None) -> None:
    notice = make_notice()
    assert ray.get(notice.save.remote()) is False, "nobody listens yet"
    listener = Listener(notice)
    deadline = time.monotonic() + 20
    while not ray.get(notice.listens.remote()):
        assert time.monotonic() < deadline
    asked = notice.save.remote()
    assert heard(listener, "save")
    assert ray.wait([asked], timeout=1)[0] == [], "it waits for the checkpoint"
    listener.saved()
    assert ray.get(asked, timeout=10) is True
    assert stop(notice)
    assert heard(listener, "stop")
    assert "save" not in listener.heard, "it would save at every step"
    listener.close()
    assert not stop(notice)
    assert ray.get(notice.save.remote()) is False, "it would wait for ever"


def test_a_listener_that_comes_later_is_told(ray_session: None) -> None:
    notice = make_notice()
    assert not stop(notice)
    listener = Listener(notice)
    assert heard(listener, "stop")
    listener.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_where_no_worker_trains(number: signal.Signals) -> None:
    stopping, never = Stopping(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.2, lambda: signal.pthread_kill(main, number)).start()
    with stopping.install(), pytest.raises(Interrupted, match=r"ended by SIG\w+, what was committed"):
        stopping.attend(lambda: never.wait(60), lambda: False)


def test_where_the_actor_is_gone_nobody_hears(ray_session: None) -> None:
    notice = make_notice()
    listener = Listener(notice)
    ray.kill(notice)
    assert not stop(notice)
    listener.saved()  # no error: a checkpoint that was made is none
    listener.close()


def test_a_signal_while_the_last_step_ends_lets_nothing_begin_after_it() -> None:
    stopping = Stopping()

    def work() -> str:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(0.2)
        return "finished"

    with stopping.install():
        assert stopping.attend(work, lambda: True) == "finished"
        with pytest.raises(Interrupted, match="told to stop"):
            stopping.check()


def test_a_listener_that_dies_after_it_heard_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langcell.recipes.stopping.LOOK_S", 0.05)
    stopping, never, answers = Stopping(), threading.Event(), iter([True, True, False])
    main = threading.main_thread().ident or 0
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGTERM)).start()
    with stopping.install(), pytest.raises(Interrupted, match="any more"):
        stopping.attend(lambda: never.wait(60), lambda: next(answers))
