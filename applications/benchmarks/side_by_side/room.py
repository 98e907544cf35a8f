"""Processes of other environments' Pythons, which work when they are asked to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parents[3]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class RoomError(RuntimeError):
    """A contender failed in its process."""


class Room:
    """A process of one environment.

    Args:
        python: the environment's interpreter.
    """

    def __init__(self, python: Path) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-m", "applications.benchmarks.side_by_side.worker"],
            cwd=HERE,
            env={**os.environ, **dict.fromkeys(THREADS, "1"), "XLA_FLAGS": XLA, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            RoomError: the work failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RoomError(f"its process ended with {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "trouble" in answer:
            raise RoomError(answer["trouble"])
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        said = [line for line in self._said.read().splitlines() if line.strip()]
        return said[-1] if said else "it said nothing"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Room:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
