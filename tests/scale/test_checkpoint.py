"""What stands on disk is whole, whenever the process is killed; what does not fit is refused by name."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import scorefn as sf
from applications.benchmarks import scale_kills
from scorefn.scale import Checkpoint, checkpoint, read_state, write_atomically
from scorefn.search import CSANES, PGPE, SNES, XNES, OpenAIES, run


def sphere(x):
    return x.square().sum()


def made(seed=0, **options):
    return SNES([1.0, -2.0, 0.5], 0.5, **{"seed": seed, **options})


def state_of(strategy):
    return checkpoint._digest(strategy.state_dict())


def test_a_state_comes_back_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "deep" / "run.pt"
    write_atomically(path, {"a": torch.arange(3.0), "b": [1, "text", {"c": None}]})
    write_atomically(path, {"a": torch.arange(4.0)})
    assert torch.equal(read_state(path)["a"], torch.arange(4.0))
    assert [found.name for found in path.parent.iterdir()] == ["run.pt"]


def test_what_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "run.pt"
    write_atomically(path, {"step": 3})
    for state, fact in (
        ({"step": lambda: 4}, r"^state\['step'\] is of type function, which could be written but not read again"),
        ({"a": [1.0, random.Random()]}, r"^state\['a'\]\[1\] is of type Random"),
        ({"a": np.float64(3.0)}, "Convert it, for instance by float"),
        ([1], "^A state must be a dict, but it is list"),
    ):
        with pytest.raises(sf.ScorefnError, match=fact):
            write_atomically(path, state)
    assert read_state(path) == {"step": 3}
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]


def test_the_file_is_on_disk_before_it_takes_the_name_and_the_folder_after(tmp_path, monkeypatch):
    path, calls = tmp_path / "run.pt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: calls.append(os.path.isdir(f"/proc/self/fd/{number}")) or fsync(number)
    )
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("renamed") or replace(*names))
    write_atomically(path, {"step": 3})
    assert calls == ([False, "renamed", True] if os.path.isdir("/proc/self/fd") else [False, "renamed", False])


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    path = tmp_path / "run.pt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f"run.pt.{checkpoint._writer()}-"
    dead, alive, foreign = (
        tmp_path / part for part in (f"{name}{ended.pid}-0.part", f"{name}1-0.part", "run.pt.x.part")
    )
    for part in (dead, alive, foreign):
        part.write_bytes(b"half")
    write_atomically(path, {"step": 3})
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["run.pt", alive.name, foreign.name])


def test_a_single_wrong_bit_is_found(tmp_path):
    path = tmp_path / "run.pt"
    write_atomically(path, {"a": torch.ones(1000)})
    whole = bytearray(path.read_bytes())
    whole[whole.find(b"\x00\x00\x80\x3f") + 40] ^= 1
    path.write_bytes(whole)
    assert float(torch.load(path, weights_only=True)["a"].sum()) != 0  # torch does not look
    with pytest.raises(sf.ScorefnError, match=r"run.pt cannot be read as a checkpoint \(ValueError: wrong checksum"):
        read_state(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", [1, 2], Evil()])
def test_what_is_no_checkpoint_is_refused_and_not_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(
        sf.ScorefnError, match="run.pt cannot be read as a checkpoint .* it is damaged, or something else"
    ):
        read_state(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(sf.ScorefnError, match="There is no checkpoint .*none.pt"):
        read_state(tmp_path / "none.pt")


@pytest.mark.parametrize("kind", [SNES, PGPE])
def test_a_search_goes_on_to_the_bit(kind, tmp_path):
    def fresh():
        return kind([1.0, -2.0, 0.5], 0.5, seed=4, maxiter=20)

    whole = fresh()
    wanted = run(whole, sphere)
    for _ in range(4):
        strategy, saved = fresh(), Checkpoint(tmp_path / "run.pt", problem="sphere")
        assert saved.resume(strategy) == (_ > 0)
        calls = []
        result = run(
            strategy,
            sphere,
            callback=lambda s, saved=saved, calls=calls: saved(s) or calls.append(1) or len(calls) == 6,
        )
    assert strategy.result.iterations == 20
    assert state_of(strategy) == state_of(whole)
    assert torch.equal(result.x, wanted.x)


def test_every_and_write(tmp_path):
    strategy, saved = made(maxiter=7), Checkpoint(tmp_path / "run.pt", every=3)
    saved.resume(strategy)
    seen = []
    run(
        strategy,
        sphere,
        callback=lambda s: (
            saved(s) or seen.append(saved.path.exists() and read_state(saved.path)["search"]["progress"]["iterations"])
        ),
    )
    assert seen == [False, False, 3, 3, 3, 6, 7]  # the last generation is never lost
    saved.write()


@pytest.mark.parametrize(
    ("other", "problem", "message"),
    [
        (lambda: made(), "disc", "is of another problem, 'sphere', but this one is 'disc'"),
        (
            lambda: SNES([1.0, -2.0], 0.5, seed=0),
            "sphere",
            r"differ at their start in \['eta_sigma', 'location', 'log_scale'",
        ),
        (lambda: SNES([1.0, -2.0, 0.6], 0.5, seed=0), "sphere", r"differ at their start in \['location'\]"),
        (lambda: made(eta_mean=0.9), "sphere", r"differ at their start in \['eta_mean'\]"),
        (lambda: made(popsize=12), "sphere", r"differ at their start in \['popsize'\]"),
        (lambda: made(seed=1), "sphere", r"differ at their start in \['generator'\]"),
        (lambda: PGPE([1.0, -2.0, 0.5], 0.5, seed=0), "sphere", "differ at their start in .*'strategy'"),
    ],
)
def test_a_stale_file_is_refused_by_name_and_nothing_changed(other, problem, message, tmp_path):
    strategy, saved = made(maxiter=2), Checkpoint(tmp_path / "run.pt", problem="sphere")
    saved.resume(strategy)
    run(strategy, sphere, callback=saved)
    written, fresh = saved.path.read_bytes(), other()
    before = state_of(fresh)
    with pytest.raises(sf.ScorefnError, match=message):
        Checkpoint(saved.path, problem=problem).resume(fresh)
    assert state_of(fresh) == before
    assert saved.path.read_bytes() == written


def test_files_of_other_versions_and_formats_are_refused(tmp_path, monkeypatch):
    strategy, saved = made(), Checkpoint(tmp_path / "run.pt")
    saved.resume(strategy)
    saved.write()
    state = read_state(saved.path)
    for entry, message in (
        ({"version": "0.0.1"}, "another version of scorefn, '0.0.1'"),
        ({"format": 7}, "another format"),
        ({"start": 3}, "another format"),
        ({"more": 3}, "another format"),
    ):
        write_atomically(saved.path, state | entry)
        with pytest.raises(sf.ScorefnError, match=message):
            Checkpoint(saved.path).resume(made())
    damaged = {**state["search"], "location": torch.full((3,), torch.nan, dtype=torch.float64)}
    write_atomically(saved.path, state | {"search": damaged})
    with pytest.raises(sf.ScorefnError, match="location"):
        Checkpoint(saved.path).resume(made())


def test_another_strategy_is_never_written_over_a_file(tmp_path):
    saved = Checkpoint(tmp_path / "run.pt")
    for act in (lambda: saved(made()), saved.write):
        with pytest.raises(sf.ScorefnError, match=r"call resume\(strategy\)"):
            act()
    saved.resume(made())
    with pytest.raises(sf.ScorefnError, match="Restarts cannot be kept"):
        saved(made())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "name"), [({"every": 0}, "every"), ({"every": True}, "every"), ({"problem": 3}, "problem")]
)
def test_bad_arguments(bad, name):
    with pytest.raises(sf.ScorefnError, match=f"^{name} must be"):
        Checkpoint("run.pt", **bad)


@pytest.mark.parametrize("path", [None, 3, "", "a\0b"])
def test_paths_that_no_file_can_have(path):
    with pytest.raises(sf.ScorefnError, match="^path must name a file"):
        Checkpoint(path)


def test_a_folder_and_a_device_are_no_files(tmp_path):
    for path, what in ((tmp_path, "folder"), (os.devnull, "device")):
        for use in (Checkpoint, read_state, lambda path: write_atomically(path, {})):
            with pytest.raises(sf.ScorefnError, match=f"is a {what}, where a file must stand"):
                use(path)


def test_what_is_no_strategy_is_refused(tmp_path):
    for strategy in (None, SNES):
        with pytest.raises(sf.ScorefnError, match="must have state_dict and load_state_dict"):
            Checkpoint(tmp_path / "run.pt").resume(strategy)


@pytest.mark.parametrize("kind", [SNES, PGPE, OpenAIES, XNES, CSANES])
def test_one_coordinate_is_enough(kind, tmp_path):
    def begun():
        return kind(torch.zeros(1), 0.1, seed=0)

    path, strategy = tmp_path / "run.pt", begun()
    saved = Checkpoint(path)
    assert not saved.resume(strategy)
    x = strategy.ask()
    strategy.tell(x, x.square().sum(-1))
    saved(strategy)
    later = begun()
    assert Checkpoint(path).resume(later)
    assert torch.equal(later.ask(), strategy.ask())


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("by_seeds", [False, True])
def test_ten_kills_lose_no_committed_generation(by_seeds, tmp_path):
    found = scale_kills.killed(tmp_path / "run.pt", kills=10, seed=1, by_seeds=by_seeds, generations=60)
    assert found.kills == 10
    assert found.lost == 0  # of those that were committed
    assert found.cost <= 1
    assert found.identical
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]
