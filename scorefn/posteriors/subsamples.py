"""SharedSubsamples: particles that run one after the other meet the same minibatch."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor


class SharedSubsamples(Messenger):  # type: ignore[misc]
    """Gives every later run the indices that the first run drew for a subsampled plate.

    Given the indices, particles are then independent and of the same distribution, as they are when they run together:
    leave-one-out compares like with like, plate element by plate element. Indices that the program itself gives
    (``subsample=``) are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[tuple[str, int, int], Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if (key := _key(msg)) in self.drawn and msg["value"] is None and not msg["done"]:
            msg["value"], msg["done"] = self.drawn[key], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if (key := _key(msg)) is not None:
            self.drawn.setdefault(key, msg["value"])


def _key(msg: Any) -> Any:
    """Name, size and subsample size of a plate that draws its indices; None: anything else."""
    fn = msg["fn"]
    if type(fn).__name__ != "_Subsample" or fn.subsample_size is None or fn.subsample_size >= fn.size:
        return None
    return msg["name"], fn.size, fn.subsample_size
