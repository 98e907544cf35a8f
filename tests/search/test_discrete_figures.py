"""The program that counts evaluations on bit strings: its functions, its rival and its files."""

import itertools
import json

import pytest
import torch

from applications.bbo.discrete_figures import (
    TASKS,
    Task,
    binval,
    jump,
    leading_ones,
    main,
    one_plus_one,
    onemax,
    search,
)


def test_the_functions_are_what_they_are_called():
    for bits in itertools.product((0, 1), repeat=5):
        x = torch.tensor([bits], dtype=torch.float64)
        leading = next((place for place, bit in enumerate(bits) if not bit), 5)
        ones = sum(bits)
        assert float(onemax(x)) == -ones
        assert float(leading_ones(x)) == -leading
        assert float(binval(x)) == -int("".join(map(str, bits)), 2)
        assert float(jump(x)) == (-(ones + 2) if ones in (0, 1, 2, 3, 5) else -1)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_all_ones_is_the_only_minimum(task):
    x = torch.ones(task.bits + 1, task.bits, dtype=torch.float64)
    x[torch.arange(task.bits), torch.arange(task.bits)] = 0
    values = task.function(x)
    assert float(values[-1]) == task.target
    assert (values[:-1] > task.target).all()


def test_both_searches_end_at_the_target_or_the_budget():
    task = Task(onemax, 8)
    for run in (search, one_plus_one):
        count, solved = run(task, 0, 5000)
        assert solved
        assert count < 5000
        assert run(task, 0, 5000) == (count, solved)
        count, solved = run(Task(leading_ones, 50), 0, 60)
        assert not solved
        assert count <= 60


def test_the_program_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("applications.bbo.discrete_figures.TASKS", (Task(onemax, 8, 100.0), Task(jump, 6)))
    main(["--seeds", "2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "result.json").read_text())
    assert list(record["tasks"]) == ["onemax 8", "jump 6"]
    assert record["tasks"]["onemax 8"]["search"]["runs"] == 2
    assert (tmp_path / "evaluations.png").stat().st_size > 0
    assert "goal 100" in capsys.readouterr().out


def test_bad_arguments_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err
