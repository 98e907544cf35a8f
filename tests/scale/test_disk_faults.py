"""A disk that fails in the middle of writing a state, and leftovers that belong to somebody else."""

import os

import pytest

from scorefn.scale import checkpoint, read_state, write_atomically


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_half_of_the_new_one(function, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    write_atomically(path, {"step": 3})

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fails)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, {"step": 4})
    assert read_state(path) == {"step": 3}
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]
    write_atomically(path, {"step": 5})
    assert read_state(path) == {"step": 5}


def test_an_interrupt_in_the_middle_leaves_no_half_either(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"

    def interrupted(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, {"step": 4})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_living_process_of_another_user_are_kept(tmp_path, monkeypatch):
    path, part = tmp_path / "run.pt", tmp_path / f"run.pt.{checkpoint._writer()}-4711-0.part"
    part.write_bytes(b"half")
    asked = []

    def not_ours(number, signal):
        asked.append((number, signal))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    write_atomically(path, {"step": 3})
    assert asked == [(4711, 0)]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["run.pt", part.name]
