"""The words to rank 0, and whether there is a rank 0 to hear them."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import ray

from langcell.errors import Interrupted
from langcell.recipes.stopping import Stopping
from langcell.train.notice import Listener, make_notice


def heard(listener: Listener, word: str) -> bool:
    deadline = time.monotonic() + 20
    while word not in listener.heard and time.monotonic() < deadline:
        time.sleep(0.01)
    return word in listener.heard


def test_words_arrive_and_are_answered(ray_session: None) -> None:
    notice = make_notice()
    assert ray.get(notice.save.remote()) is False, "nobody listens yet"
    listener = Listener(notice)
    time.sleep(0.2)
    asked = notice.save.remote()
    assert heard(listener, "save")
    assert ray.wait([asked], timeout=1)[0] == [], "it waits for the checkpoint"
    listener.saved()
    assert ray.get(asked, timeout=10) is True
    assert ray.get(notice.stop.remote()) is True
    assert heard(listener, "stop")
    assert "save" not in listener.heard, "it would save at every step"
    listener.close()
    assert ray.get(notice.stop.remote()) is False
    assert ray.get(notice.save.remote()) is False, "it would wait for ever"


def test_a_listener_that_comes_later_is_told(ray_session: None) -> None:
    notice = make_notice()
    assert ray.get(notice.stop.remote()) is False
    listener = Listener(notice)
    assert heard(listener, "stop")
    listener.close()


def test_a_signal_ends_the_job_where_no_worker_trains() -> None:
    stopping, never = Stopping(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGTERM)).start()
    with stopping.install(), pytest.raises(Interrupted, match="no worker trains"):
        stopping.attend(lambda: never.wait(60), lambda: False)
