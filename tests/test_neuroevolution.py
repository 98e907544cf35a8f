"""The program that trains policies without backpropagation: its networks, episodes, and resumption."""

import json

import pytest
import torch
from torch import nn

import scorefn as sf
from applications.bbo.neuroevolution import METHODS, TASKS, Arena, Perceptrons, Task, Training, main, train

SMALL = Task("CartPole-v1", 6, 4, 0.5, 0.5, 0.2, None, True)


def test_all_networks_at_once_are_each_network_alone():
    networks = Perceptrons([4, 5, 3, 2])
    parameters = torch.randn(7, networks.dimension, dtype=torch.float64)
    x = torch.randn(7, 4, dtype=torch.float64)
    together = networks(parameters, x)
    for own, inputs, outputs in zip(parameters, x, together, strict=True):
        alone = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        nn.utils.vector_to_parameters(own, alone.parameters())
        torch.testing.assert_close(outputs, alone(inputs), rtol=1e-12, atol=1e-12)


def test_a_linear_policy_has_no_hidden_layer():
    networks = Perceptrons([4, 2])
    assert networks.dimension == 10
    parameters = torch.arange(10.0).unsqueeze(0)
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    assert networks(parameters, x).tolist() == [[0 + 4 + 8, 4 + 12 + 9]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perceptrons([4]), r"sizes are \[4\], but a network has inputs and outputs"),
        (lambda: Perceptrons([4, 0, 2]), r"sizes are \[4, 0, 2\]"),
        (lambda: Perceptrons([4, 2])(torch.zeros(3, 9), torch.zeros(3, 4)), r"shape \(3, 9\).* 10 parameters each"),
        (lambda: Arena("FrozenLake-v1", 2), "FrozenLake-v1 observes Discrete"),
    ],
)
def test_refused_networks_and_environments(make, message):
    with pytest.raises(sf.ScorefnError, match=message):
        make()


def test_an_episode_counts_until_its_own_end():
    """Members with other parameters end at other steps; each has the return that it has alone."""
    parameters = 2 * torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
    together = Arena("CartPole-v1", 5).play(parameters, lambda x: x, [7] * 5)
    assert len(set(together.returns.tolist())) > 1
    assert together.steps == together.returns.sum() == len(together.observations)
    for own, expected in zip(parameters, together.returns, strict=True):
        alone = Arena("CartPole-v1", 1).play(own.unsqueeze(0), lambda x: x, [7])
        assert alone.returns.item() == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_same_to_the_bit(method, tmp_path):
    whole = Training(SMALL, method, seed=3)
    train(whole, checkpoint=tmp_path / "whole.pt")
    first = Training(SMALL, method, seed=3)
    first.step()
    first.step()
    torch.save(first.state(), tmp_path / "state.pt")
    second = Training(SMALL, method, seed=3).load(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second)
    assert second.curve == whole.curve
    assert torch.equal(second.strategy.mean, whole.strategy.mean)
    assert torch.equal(second.normalisation.mean, whole.normalisation.mean)
    assert len(whole.curve.mean) == 4
    with pytest.raises(sf.ScorefnError, match=r"differs from what is asked for in .*'seed': \(3, 4\)"):
        Training(SMALL, method, seed=4).load(first.state())


def test_a_bounded_action_space_is_clipped_and_the_normalisation_counts_every_step():
    task = Task("Pendulum-v1", 4, 1, 0.5, 0.5, 0.2, None, True)
    training = Training(task, "pgpe", seed=0)
    training.step()
    assert training.normalisation.count == training.curve.steps[0] == 4 * 200
    assert training.curve.best[0] >= training.curve.mean[0]


def test_the_program_writes_its_result_and_goes_on_only_when_asked(tmp_path, capsys):
    arguments = ["--popsize", "8", "--episodes", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--generations", "2"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"]
    assert result["parameters"] == 10
    assert len(result["curve"]["mean"]) == 2
    assert (tmp_path / "neuroevolution.png").exists()
    with pytest.raises(SystemExit):
        main([*arguments, "--generations", "2"])
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--generations", "3", "--resume"]) == 0
    assert len(json.loads((tmp_path / "result.json").read_text())["curve"]["mean"]) == 3
    with pytest.raises(SystemExit):
        main([*arguments, "--method", "openai-es", "--resume"])
    assert "differs from what is asked for" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--popsize", "7", "--out", str(tmp_path / "other")])
    assert "popsize must be even" in capsys.readouterr().err


def test_the_tasks_exist():
    assert {task.env for task in TASKS.values()} == {"CartPole-v1", "HalfCheetah-v5"}
