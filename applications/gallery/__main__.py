"""Figures of the gallery that no application draws by itself: ``python -m applications.gallery [--only NAME ...]``.

Each figure is a module of this folder with a function ``draw(folder)``, which writes the picture and returns its path;
``FIGURES`` names them. The other figures of docs/gallery are the plots that the applications leave in ``--out``.

Ctrl-C ends after the present figure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from applications.gallery import curves, policies, posterior, search_paths, variance_bars
from applications.progress import Interruption, show_line
from applications.results import write_result

FIGURES: dict[str, Callable[[Path], Path]] = {
    "posterior": posterior.draw,
    "variance_bars": variance_bars.draw,
    "cartpole": policies.draw_cartpole,
    "gridworld_policy": policies.draw_gridworld,
    "inventory": policies.draw_inventory,
    "reinforce_to_ppo": curves.draw_programs,
    "contextual_bandit": curves.draw_bandit,
    "fewest_mistakes": curves.draw_mistakes,
    "search_path": search_paths.draw_rosenbrock,
    "rotated_ellipsoid": search_paths.draw_rotated_ellipsoid,
}
"""By name: what draws a figure into a folder and says where it is."""

LARGEST = 300_000  # bytes that a picture beside a page may have


def main(argv: list[str] | None = None) -> int:
    """Draw the figures in turn."""
    parser = argparse.ArgumentParser("python -m applications.gallery", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(FIGURES), default=list(FIGURES),
                        help=f"of {', '.join(FIGURES)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"), help="folder of the figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    names, found = list(dict.fromkeys(options.only)), dict[str, dict[str, float | str]]()
    with Interruption() as interrupted:
        for name in names:
            show_line(f"{name} ...".ljust(60), last=False)
            begin = time.process_time()
            path = FIGURES[name](options.out)
            size, seconds = path.stat().st_size, time.process_time() - begin
            found[name] = {"file": path.name, "bytes": size, "cpu_seconds": seconds}
            remark = "" if size <= LARGEST else f", more than the {LARGEST // 1000} kB of a page"
            show_line(f"{name}: {path}, {size // 1000} kB{remark}, {seconds:.1f} s CPU".ljust(60), last=True)
            if interrupted():
                break
    write_result(options.out, vars(options), {"complete": len(found) == len(names), "figures": found})
    return 0 if len(found) == len(names) else 130


if __name__ == "__main__":
    sys.exit(main())
