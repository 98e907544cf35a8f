"""Where an interrupted run stands: one file, which holds the state of torch's generator too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import scorefn as sf

Run = TypeVar("Run")


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state and torch's generator, in one piece or not at all.

    Args:
        path: its folder is made where it is missing.
        state: numbers, texts, tensors, and lists and dicts of them; under none of its names stands ``generator``.
    """
    sf.scale.write_atomically(path, {**state, "generator": torch.get_rng_state()})


def read_checkpoint(path: Path, names: Collection[str], build: Callable[[dict[str, Any]], Run]) -> Run:
    """Make a run of a checkpoint, and then set torch's generator to where it stood; on an error it is left alone.

    Args:
        path: what ``write_checkpoint`` wrote.
        names: of the entries of the state that the run is made of.
        build: makes it of the state; what it draws on the way changes nothing.

    Raises:
        sf.ScorefnError: no such file, a damaged one, one of another program or version, or as ``build`` says.
    """
    if not path.exists():
        raise sf.ScorefnError(f"There is no checkpoint {path} to resume: leave out --resume to begin a run.")
    state = sf.scale.read_state(path)
    lacking = [name for name in (*names, "generator") if name not in state]
    if lacking:
        raise sf.ScorefnError(
            f"{path} cannot be resumed here, because it lacks {lacking}: another program or version wrote it. Resume "
            "it with that one, or begin the run anew in another folder."
        )
    before = torch.get_rng_state()
    try:
        run = build(state)
        torch.set_rng_state(state["generator"])
    except sf.ScorefnError:
        torch.set_rng_state(before)
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        torch.set_rng_state(before)
        raise sf.ScorefnError(
            f"{path} does not fit this program ({_told(error)}): another version wrote it. "
            "Resume it with that one, or begin the run anew in another folder."
        ) from error
    return run


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
