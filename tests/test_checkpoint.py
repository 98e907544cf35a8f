"""Checkpoints of the programs: whole or not at all, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.rl import cartpole, sequence


def itself(state: dict[str, Any]) -> dict[str, Any]:
    torch.rand(3)
    return state


def test_state_and_generator_come_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "seed-0.pt"
    write_checkpoint(path, {"step": 3, "weights": {"w": torch.ones(2)}})
    expected = torch.rand(4)
    torch.manual_seed(99)
    found = read_checkpoint(path, ["step", "weights"], itself)
    assert torch.equal(torch.rand(4), expected)  # whatever was drawn while the run was made
    assert found["step"] == 3
    assert torch.equal(found["weights"]["w"], torch.ones(2))
    assert [file.name for file in path.parent.iterdir()] == ["seed-0.pt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "seed.pt"
    write_checkpoint(path, {"step": 3})
    with pytest.raises(sf.ScorefnError, match="is of type function, which could be written but not read again"):
        write_checkpoint(path, {"step": lambda: 4})
    assert read_checkpoint(path, ["step"], itself)["step"] == 3


def missing(state: dict[str, Any]) -> None:
    raise KeyError(next(iter(state)))


def unwanted(state: dict[str, Any]) -> None:
    raise sf.ScorefnError("These are other settings.")


@pytest.mark.parametrize(
    ("content", "names", "build", "message"),
    [
        (None, [], itself, "There is no checkpoint .*seed.pt to resume: leave out --resume"),
        (b"no checkpoint at all", [], itself, "seed.pt cannot be read as a checkpoint .* it is damaged"),
        (3, [], itself, r"seed.pt cannot be read as a checkpoint \(TypeError"),
        ({"step": 3}, ["step"], itself, r"it lacks \['generator'\]: another program or version wrote it"),
        ({"generator": torch.ones(2)}, ["a", "b"], itself, r"it lacks \['a', 'b'\]"),
        ({"generator": torch.ones(2)}, [], itself, r"does not fit this program \((TypeError|RuntimeError)"),
        ({"step": 3, "generator": torch.ones(2)}, ["step"], missing, r"does not fit this program \(KeyError: 'step'\)"),
        ({"step": 3, "generator": torch.ones(2)}, ["step"], unwanted, "^These are other settings.$"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_generator_left_alone(
    content: Any, names: list[str], build: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "seed.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = torch.get_rng_state()
    with pytest.raises(sf.ScorefnError, match=message):
        read_checkpoint(path, names, build)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_programs_refuse_the_checkpoints_of_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pole, copy = tmp_path / "pole.pt", tmp_path / "copy.pt"
    cartpole.train(0, cartpole.Config(num_samples=2), should_stop=lambda: True, checkpoint=pole)
    sequence.train(0, sequence.Config(prompts=2, hidden=4), should_stop=lambda: True, checkpoint=copy)
    for program, other, lacking in ((cartpole, copy, "'policy'"), (sequence, pole, "'model'")):
        for path, message in ((other, lacking), (tmp_path / "nowhere.pt", "There is no checkpoint")):
            with pytest.raises(SystemExit, match="2"):
                program.main(["--resume", str(path), "--out", str(tmp_path)])
            assert message in capsys.readouterr().err


def test_another_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pole.pt"
    cartpole.train(0, cartpole.Config(num_samples=2), should_stop=lambda: True, checkpoint=path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"] | {"depth": 3}}, path)
    with pytest.raises(sf.ScorefnError, match=r"pole.pt does not fit this program \(TypeError: .*'depth'"):
        cartpole.load(path)
    torch.save(state | {"config": state["config"] | {"hidden": 7}}, path)
    with pytest.raises(sf.ScorefnError, match=r"does not fit this program \(RuntimeError: .*size mismatch"):
        cartpole.load(path)
