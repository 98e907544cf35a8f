"""The training program on two processes: the updates of one process, and what happens when one is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import scorefn as sf
from applications.rl import train as program
from applications.rl.ranks import Ranks
from applications.rl.settings import METHODS, settings_for
from applications.rl.training import Training
from tests.rank_training import SMALL, updated

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
PROGRAM = ["--rdzv-endpoint=localhost:0", "-m", "applications.rl.train", "--episodes", "2"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes, and what each found."""
    folder = tmp_path_factory.mktemp("training")
    command = [sys.executable, "-m", "tests.rank_training"]
    jobs = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [job.communicate(timeout=180)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_learn_what_one_process_does(method: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Three updates of networks in single precision, from the same draws."""
    whole = updated(method, Ranks())
    for found in ranks[1]:
        assert set(found[method]) == set(whole)
        for name, value in whole.items():
            torch.testing.assert_close(
                found[method][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_resumed_run_of_two_ranks_is_the_same_run(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in ranks[1]:
        found = found["resumed"]
        assert found["begun"] == (3, 2)  # all stopped where one was told to, one update after the checkpoint
        assert found["same"]
        assert found["updates"] == (6, 6)
    states = [found["resumed"]["state"] for found in ranks[1]]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_another_number_of_ranks_goes_on_too(ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    training = Training.load(ranks[0] / "whole" / "checkpoint.pt")
    assert training.updates == 6
    assert training.num_envs == 6
    before = torch.cat([p.detach().flatten() for p in training.policy.parameters()])
    training.update()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in training.policy.parameters()]))
    again = Training.load(ranks[0] / "whole" / "checkpoint.pt")
    again.update()
    assert all(map(torch.equal, training.policy.parameters(), again.policy.parameters()))


def test_processes_that_were_started_for_different_runs(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in ranks[1]:
        assert re.match(r"The processes were not started for the same run: rank\(s\) \[1\] differ", found["different"])


def test_the_checkpoint_of_another_run_is_refused_by_every_rank(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in ranks[1]:
        assert re.search("of a run of CartPole-v1 by ppo_clip, which differs .* in method, total_steps", found["stale"])


def test_streams_that_cannot_be_dealt_out() -> None:
    message = "The 6 streams of an update cannot be split evenly over 4 processes: start 1, 2, 3 or 6 of them"
    with pytest.raises(sf.ScorefnError, match=message):
        Training(SMALL, 0, Ranks(0, 4))


def test_seeds_of_ranks_differ() -> None:
    seeds = {
        Ranks(rank, size).seed(seed, n) for size in (2, 3) for rank in range(size) for seed in (0, 1) for n in (0, 9)
    }
    assert len(seeds) == 2 * 2 * (2 + 3)


def job(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, *PROGRAM, "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def worker(parent: int, rank: int) -> int:
    """The process id of a rank."""
    for folder in Path("/proc").iterdir():
        try:
            child = folder.name.isdigit() and f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if child and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_job_with_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    running, begin = job(tmp_path, "--env", "Acrobot-v1", "--lambda", "0.9"), time.monotonic()
    try:
        while not (checkpoint.exists() and torch.load(checkpoint, weights_only=True)["updates"] > 0):
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() - begin < 120
            time.sleep(0.2)
        os.kill(worker(running.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0
    assert time.monotonic() - killed < 45
    assert "Signal 9 (SIGKILL)" in output, output
    settings = replace(settings_for("Acrobot-v1"), lambda_=0.9)
    training = Training.load(checkpoint, settings)
    assert training.updates >= 25
    with pytest.raises(sf.ScorefnError, match="which differs from what is asked for in method"):
        Training.load(checkpoint, replace(settings, method="rloo"))
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_torchrun_trains_and_rank_0_writes(tmp_path: Path) -> None:
    done = job(tmp_path, "--env", "CartPole-v1", "--total-steps", "5000")
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 0, output
    names = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert names == ["checkpoint", "curve", "events", "result"]
    assert '"processes": 2' in output
    assert output.count("steps per CPU second") >= 1


@pytest.mark.parametrize("timeout", ["0", "-3", "nan"])
def test_a_timeout_that_is_none(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--rank-timeout", timeout])
    assert "--rank-timeout is" in capsys.readouterr().err
