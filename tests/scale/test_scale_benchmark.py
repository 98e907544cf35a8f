"""The program of the page about scale: its pieces count right, and its tables say what was found."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from applications.benchmarks import scale as program
from applications.benchmarks import scale_kills

FORK = multiprocessing.get_context("fork")


def test_bytes_are_those_of_pickles_in_both_directions():
    with ThreadPoolExecutor(1) as executor:
        counting = program.Counting(executor, 1)
        assert counting.submit(abs, -3000).result() == 3000
    there, back = (abs, (-3000,), {}), 3000
    assert counting.bytes == sum(len(pickle.dumps(entry, protocol=5)) for entry in (there, back))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_seeds_need_few_bytes_and_points_all_of_theirs():
    with ProcessPoolExecutor(2, mp_context=FORK) as executor:
        found = {
            by: program.bytes_per_individual(executor, 500, 40, by_seeds=by == "seeds", generations=6)
            for by in ("seeds", "points")
        }
    assert found["seeds"]["bytes"] <= 64
    assert 4 * 500 < found["points"]["bytes"] < 4 * 500 + 100  # float32
    assert found["seeds"]["states"] >= 2
    assert found["points"]["states"] == 0


def test_tables():
    row = {"dimension": 1000, "bytes": 28.61, "seconds": 0.0123, "states": 2}
    both = {**row, "points_bytes": 4018.2, "points_seconds": 0.006}
    table = program.seeds_table({"rows": [row, both], "identical": {"SNES": True, "PGPE": False}}).splitlines()
    assert table[2:4] == ["| 1,000 | 28.6 | not tried | 0.012 |  |", "| 1,000 | 28.6 | 4,018 | 0.012 | 0.006 |"]
    assert table[-1] == "Equal to the bit: 1 of 2."
    table = scale_kills.table({"run": scale_kills.Kills(100, 0, 1, 50, True, 200)}).splitlines()
    assert table[-1] == "| `run` | 100 | 50 | 0 | 1 | yes |"


@pytest.mark.parametrize(("program", "bad"), [(program, "--kills"), (program, "--popsize"), (scale_kills, "--kills")])
def test_bad_arguments_are_refused_by_name(program, bad, capsys):
    with pytest.raises(SystemExit):
        program.main([bad, "0"])
    assert f"{bad}: it is 0, but must be" in capsys.readouterr().err
