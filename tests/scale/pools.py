"""Pools of two processes, and searches that are alike."""

import multiprocessing
import queue
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor

import numpy as np

import scorefn as sf

FORK = multiprocessing.get_context("fork")


def pool(num=2):
    return ProcessPoolExecutor(num, mp_context=FORK, initializer=sf.scale.one_thread)


class Delayed(Executor):
    """Runs each call at once, in this process, and hands the answers back in the opposite order."""

    num_workers = 3

    def __init__(self):
        self.futures = queue.LifoQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.futures.put((future, fn(*args, **kwargs)))
        return future

    def _answer(self):
        while True:
            time.sleep(0.0005)
            future, value = self.futures.get()
            if future.set_running_or_notify_cancel():
                future.set_result(value)


def assert_same(result, wanted):
    for name in ("x", "best_x", "mean", "sigma"):
        assert np.asarray(getattr(result, name)).tobytes() == np.asarray(getattr(wanted, name)).tobytes()
    for name in ("fun", "best_fun", "nfev", "nit", "stop", "failed", "restarts"):
        assert getattr(result, name) == getattr(wanted, name)
    for name in ("nfev", "best", "median", "sigma", "run"):
        assert getattr(result.history, name).tobytes() == getattr(wanted.history, name).tobytes()
