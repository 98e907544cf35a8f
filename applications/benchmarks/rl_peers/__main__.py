"""CartPole-v1 beside the hand-written loop, Stable-Baselines3, Tianshou and TorchRL.

    python -m applications.benchmarks.rl_peers [--peers all|none|sb3,tianshou,torchrl] [--seeds 5] [--quick] [--out DIR]

Two questions, in one run on one thread: how many environment steps a second of CPU time learns from, and what it takes
until the sampled policy is good. Each library lives in a process of its own, because importing TorchRL turns argument
validation off for everybody; the processes work one at a time and take turns, and what is measured is the time of the
process that works. The hand-written loop shares scorefn's process, and its gradient is compared with scorefn's first.

A peer is imported only where it is asked for. None is a dependency: install them into an environment of their own,

    python -m venv peers && peers/bin/pip install torch stable-baselines3 tianshou torchrl gymnasium

and run this with that environment's Python, scorefn's checkout being the working directory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from applications.benchmarks.rl_peers.contestants import run
from applications.benchmarks.rl_peers.learners import TOLERANCE, gradient_difference
from applications.benchmarks.rl_peers.libraries import MODULES, PACKAGES
from applications.benchmarks.rl_peers.page import page


def check_installed(peers: list[str]) -> None:
    """Leave with a message that says what to install."""
    missing = [PACKAGES[peer] for peer in peers if find_spec(MODULES[peer]) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} cannot be found by {sys.executable}: install into an environment of its own "
            f"(python -m venv peers && peers/bin/pip install torch {' '.join(missing)} gymnasium) and use its Python, "
            "or leave the peer out with --peers."
        )


def peers_asked(text: str) -> list[str]:
    """The keys of PACKAGES that are meant.

    Raises:
        SystemExit: a name that is none of them.
    """
    if text in ("all", "none"):
        return list(PACKAGES) if text == "all" else []
    names = text.split(",")
    if unknown := [name for name in names if name not in PACKAGES]:
        raise SystemExit(f"--peers {text}: {unknown[0]!r} is not one of all, none, {', '.join(PACKAGES)}.")
    return names


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default="all", help="all, none, or some of sb3,tianshou,torchrl")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="whether everything runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="write rl_peers.md and rl_peers.json, to this folder")
    parser.add_argument("--page", type=Path, help="write the page to this Markdown file")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    peers = peers_asked(options.peers)
    check_installed(peers)
    torch.set_num_threads(1)
    difference = {name: gradient_difference(0, steps=steps) for name, steps in (("whole", None), ("segments", 128))}
    if max(difference.values()) > TOLERANCE:
        raise SystemExit(
            f"The hand-written gradient is not scorefn's, relative differences {difference}: no comparison."
        )
    results = run(peers, 1 if options.quick else options.seeds, options.quick)
    text = page(results, difference, peers, options)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "rl_peers.md").write_text(text, encoding="utf-8")
        (options.out / "rl_peers.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
