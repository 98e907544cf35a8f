"""The training program: every method runs, learns its bookkeeping right, stops, resumes and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scorefn as sf
from applications.rl import train as program
from applications.rl.settings import METHODS, Settings, settings_for
from applications.rl.train import train
from applications.rl.training import Training

SMALL = Settings(
    "CartPole-v1",
    "gae",
    total_steps=3_000,
    num_envs=4,
    steps=100,
    vectorization="vector_entry_point",
    hidden=(8,),
    value_steps=2,
    epochs=2,
    minibatch=64,
    checkpoint_every=2,
)


def parameters(training: Training) -> torch.Tensor:
    modules = (training.policy, training.value)
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_policy(method: str, tmp_path: Path) -> None:
    training = Training(replace(SMALL, method=method), seed=0)
    before = parameters(training)
    assert train(training, tmp_path)
    assert training.env_steps >= 3_000
    assert not torch.equal(before, parameters(training))
    assert training.curve[-1][0] == training.env_steps


@pytest.mark.parametrize("method", ["rloo", "gae", "ppo_clip"])
def test_a_resumed_run_is_the_same_run(method: str, tmp_path: Path) -> None:
    settings = replace(SMALL, method=method)
    whole = Training(settings, seed=3)
    train(whole, tmp_path / "whole")
    stopped = Training(settings, seed=3)
    assert not train(stopped, tmp_path / "parts", should_stop=lambda: stopped.updates == 3)  # one after a checkpoint
    torch.manual_seed(99)  # what happens in between does not matter
    resumed = Training.load(tmp_path / "parts" / "checkpoint.pt", settings)
    assert resumed.updates == 2
    train(resumed, tmp_path / "parts")
    assert torch.equal(parameters(whole), parameters(resumed))
    assert whole.curve == resumed.curve
    assert list(whole.recent) == list(resumed.recent)


def test_stopped_before_the_first_checkpoint_there_is_one(tmp_path: Path) -> None:
    training = Training(SMALL, seed=0)
    with pytest.raises(KeyboardInterrupt):
        train(training, tmp_path, progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert Training.load(tmp_path / "checkpoint.pt", SMALL).updates == 0


def test_a_checkpoint_of_another_env_or_version_is_refused(tmp_path: Path) -> None:
    training = Training(SMALL, seed=0)
    path = tmp_path / "checkpoint.pt"
    training.save(path)
    with pytest.raises(sf.ScorefnError, match="CartPole-v1 by gae, which differs .* in env"):
        Training.load(path, replace(SMALL, env="Acrobot-v1"))
    torch.save(torch.load(path, weights_only=True) | {"format": 0}, path)
    with pytest.raises(sf.ScorefnError, match="has format 0 with .* but this program reads format 1"):
        Training.load(path)
    with pytest.raises(sf.ScorefnError, match="There is no checkpoint .*nowhere"):
        Training.load(tmp_path / "nowhere")


def test_returns_go_on_from_one_segment_to_the_next() -> None:
    """CartPole pays 1 a step: an episode's return is its length, however the segments cut it."""
    training = Training(replace(SMALL, steps=7), seed=0)
    lengths, running = [], torch.zeros(4)
    for _ in range(30):
        tau = sf.draw(training.measure, sf.trajectories.rewards, 4).x
        training._note_returns(tau)
        for t in range(7):
            running += tau.mask[:, t]
            lengths += running[tau.done[:, t]].tolist()
            running[tau.done[:, t]] = 0
    assert len(lengths) > 10
    assert sorted(training.recent) == sorted(lengths[-100:])


def test_the_program_writes_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "settings_for", lambda env, method: SMALL)
    assert program.main(["--env", "CartPole-v1", "--out", str(tmp_path), "--episodes", "4"]) == 0
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names >= {"result", "curve", "checkpoint", "events"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["env"], result["episodes_evaluated"]) == ("CartPole-v1", 4)
    promised = "env seed env_steps cpu_seconds wall_seconds eval_sampled_mean eval_sampled_std eval_greedy_mean"
    assert set(result) >= set(promised.split())


def test_there_is_a_row_for_every_task_and_method() -> None:
    for env in ("CartPole-v1", "Acrobot-v1", "InvertedPendulum-v5", "LunarLander-v3", "HalfCheetah-v5", "Hopper-v5"):
        assert settings_for(env).env == env
        for method in METHODS:
            assert settings_for(env, method).method == method


def test_an_unknown_environment_is_refused() -> None:
    with pytest.raises(sf.ScorefnError, match=r"no settings for 'Pong-v5', only for CartPole-v1, Acrobot-v1"):
        settings_for("Pong-v5")


@pytest.mark.parametrize("damage", [b"", b"no checkpoint at all", "cut"])
def test_a_damaged_checkpoint_is_refused(damage: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    Training(SMALL, seed=0).save(path)
    path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else damage)
    with pytest.raises(sf.ScorefnError, match="cannot be read as a checkpoint"):
        Training.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "1"], "--episodes is 1, but it must be at least 2"),
        (["--total-steps", "0"], "--total-steps is 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0"),
        (["--lambda", "7"], r"--lambda is 7.0, but it must lie in \[0, 1\]"),
        (["--env", "Pong-v5"], "no settings for 'Pong-v5'"),
        (["--resume"], "There is no checkpoint"),
    ],
)
def test_a_command_line_that_makes_no_run(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--out", str(tmp_path / "run"), *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint.pt"
    Training(settings_for("CartPole-v1"), seed=0).save(path)
    before = path.read_bytes()
    for arguments, message in (
        ([], "belongs to an earlier run"),
        (["--resume", "--seed", "5"], "is of seed 0, but --seed is 5"),
    ):
        with pytest.raises(SystemExit, match="2"):
            program.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    path.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        program.main(["--out", str(tmp_path / "file")])
