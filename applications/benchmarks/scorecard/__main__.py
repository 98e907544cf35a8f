"""The scorecard's program: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch

from applications.benchmarks.scorecard import page, problems
from applications.benchmarks.scorecard.environments import PEERS, interpreter
from applications.progress import Interruption

HERE = Path(__file__).resolve().parents[3]


def names_among(known: list[str], what: str):
    """An argument that lists some of the known names."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there is no {what} {name!r}: choose among {', '.join(known)}")
        return found

    return names


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {text}, but must be a positive number of seconds")
    return value


def ask(peer: str, environments: Path, out: Path, wanted: list[str], seconds: float) -> None:
    """Run one worker; whatever happens to it is in ``out`` afterwards."""
    python, trouble = interpreter(peer, environments)
    if python is not None:
        command = [str(python), "-m", f"applications.benchmarks.scorecard.peers.{peer}"]
        command += ["--out", str(out.resolve()), "--seconds", str(seconds), "--problems", ",".join(wanted)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        done = subprocess.run(
            command, cwd=HERE, env={**os.environ, **threads}, stderr=subprocess.PIPE, text=True, check=False
        )
        if not done.returncode:
            return
        said = [line for line in done.stderr.splitlines() if line.strip()]
        trouble, status = (said[-1] if said else f"ended with {done.returncode}"), "crashed"
    else:
        status = "not installed"
    row = {"peer": peer, "problem": "", "estimator": "", "status": status, "error": trouble}
    whole = {"peer": peer, "versions": {}, "seed": 0, "rows": [row]}
    (out / f"{peer}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"{peer}: {status}: {trouble}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m applications.benchmarks.scorecard", description=__doc__)
    parser.add_argument("--peers", type=names_among(list(PEERS), "peer"), default=list(PEERS))
    parser.add_argument("--problems", type=names_among(list(problems.PROBLEMS), "problem"), default=[])
    parser.add_argument("--environments", type=Path, default=Path("runs/scorecard/environments"))
    parser.add_argument("--seconds", type=positive, default=5.0, help="CPU seconds a row may take")
    parser.add_argument("--out", type=Path, default=Path("runs/scorecard"))
    parser.add_argument("--page", type=Path, help="write the whole scorecard here, from all results in --out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.environments.mkdir(parents=True, exist_ok=True)
    with Interruption() as interrupted:
        for peer in options.peers:
            if interrupted():
                break
            ask(peer, options.environments, options.out, options.problems, options.seconds)
    torch.set_num_threads(1)
    results = page.load(options.out)
    for row in results.rows:
        if row.peer in options.peers and (not options.problems or row.problem in options.problems):
            print(f"{row.peer:13} {row.problem:16} {row.label:40.40} {row.judgement.verdict:14} {row.judgement.detail}")
    if options.page is not None:
        print(f"wrote {', '.join(str(path) for path in page.write(results, options.page))}")


if __name__ == "__main__":
    main()
