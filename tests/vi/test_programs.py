"""Spike and slab, and the change point: both programs run, repeat themselves and refuse."""

import json

import pytest

from applications.vi import change_point, spike_and_slab


@pytest.mark.parametrize("program", [spike_and_slab, change_point])
def test_a_program_writes_its_result_and_repeats_itself(program, tmp_path, capsys):
    for run in ("one", "two"):
        assert program.main(["--steps", "20", "--particles", "4", "--seed", "3", "--out", str(tmp_path / run)]) == 0
    name = program.__name__.rpartition(".")[2]
    told = [json.loads((tmp_path / run / "result.json").read_text(encoding="utf-8")) for run in ("one", "two")]
    assert told[0]["complete"] is True
    bounds = [[row["bound"] for row in each["families"]] for each in told]
    assert bounds[0] == bounds[1]
    assert all(row["bound"] < row["best_bound"] <= told[0]["log_evidence"] + 1e-9 for row in told[0]["families"])
    assert (tmp_path / "one" / f"{name}.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.part"))
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.parametrize("program", [spike_and_slab, change_point])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "it is 0, but must be 1 or more"), (["--particles", "x"], "no whole number: give 2 or more")],
)
def test_a_program_refuses_before_it_works(program, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main([*arguments, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
