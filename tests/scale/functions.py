"""Functions at the top of a module, as workers need them."""

import os
import time
from pathlib import Path

import numpy as np


def sphere(x):
    return float(((x - 1.0) ** 2).sum())


def rows(x):
    return ((x - 1.0) ** 2).sum(-1)


def uneven(x):
    """Another time for each point, so that points come in another order."""
    time.sleep(float(abs(x[0])) % 0.003)
    return sphere(x)


def asleep(x):
    time.sleep(0.02)
    return sphere(x)


def no_number(x):
    return "text"


def once(folder, what, x):
    """The sphere, but for the very first call: what happens then is told by ``what``."""
    try:
        Path(folder, "done").touch(exist_ok=False)
    except FileExistsError:
        return sphere(x)
    return what(x)


def dies(x):
    os._exit(1)


def hangs(x):
    time.sleep(1000)
    return 0.0


def bad_points(what, x):
    """Points right of 1 come to grief, others do not."""
    return what(x) if x[0] > 1.0 else sphere(x)


def as_nan(x):
    return float("nan") if x[0] > 1.0 else sphere(x)


class Machine:
    """A function with what cannot be pickled inside."""

    def __init__(self):
        self.parts = {"valve": lambda x: x}

    def __call__(self, x):
        return np.inf

    def method(self, x):
        return np.inf


def fails(x):
    raise KeyError("never")


def leaves(x):
    raise SystemExit(3)


def raises_a_local_class(x):
    class Local(Exception):
        pass

    raise Local("it cannot travel")


def closure():
    number = 3.0

    def inner(x):
        return number

    return inner


def parts(p):
    return float(p["x"].square().sum() + p["y"].square().sum())


def ballast(weight, x):
    return sphere(x)


def interrupted(x):
    raise KeyboardInterrupt


def bad_rows(x):
    if (x[:, 0] > 1.0).any():
        raise KeyError("a row")
    return rows(x)
