"""Progress, interruption and results of the programs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result


def test_steps_are_taken_and_marked_at_the_end() -> None:
    taken: list[int] = []
    marks = [mark.step for mark in timed_steps(lambda: taken.append(1), 10, marks=3)]
    assert marks == [3, 6, 9, 10]
    assert len(taken) == 10


def test_a_stop_ends_after_the_step_with_a_last_mark() -> None:
    taken: list[int] = []
    steps = timed_steps(lambda: taken.append(1), 100, marks=1, should_stop=lambda: len(taken) == 7)
    assert [mark.step for mark in steps] == [7]
    assert len(taken) == 7


def test_interruption_is_asked_then_forced_and_then_undone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_ends_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    show_line("half", last=False)
    show_line("done", last=True)
    assert capsys.readouterr().out == "half\ndone\n"


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_result(tmp_path / "deep" / "runs", {"out": tmp_path}, {"value": 1.5})
    assert json.loads(path.read_text()) == {"arguments": {"out": str(tmp_path)}, "value": 1.5}
    with pytest.raises(TypeError):
        write_result(path.parent, {}, {"value": object()})
    assert json.loads(path.read_text())["value"] == 1.5
