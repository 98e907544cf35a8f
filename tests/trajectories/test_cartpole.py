"""The program: reproducible, resumed bit for bit, and it leaves global state alone."""

import signal

import pytest
import torch

from applications.rl.cartpole import Config, confirm, evaluate, load, main, train

QUICK = Config(num_samples=8, threshold=40.0, stop_at=40.0, episodes=10, max_updates=12)


def same(a, b):
    assert all(map(torch.equal, a.policy.parameters(), b.policy.parameters()))
    for one, other in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (a.seed, a.updates, a.env_steps, a.solved) == (b.seed, b.updates, b.env_steps, b.solved)
    assert a.returns == b.returns
    assert a.evaluated == b.evaluated
    assert torch.equal(confirm(a), confirm(b))


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    file = tmp_path / "runs" / "seed.pt"
    through = train(3, QUICK)
    assert through.updates > 4
    asked = iter([False, False, True])
    stopped = train(3, QUICK, should_stop=lambda: next(asked), checkpoint=file)
    assert stopped.updates == 3
    assert not stopped.solved
    torch.manual_seed(99)  # what happens in between does not matter
    resumed = train(0, resume=file)
    same(through, resumed)
    assert resumed.config == QUICK
    assert resumed.train_seconds > stopped.train_seconds


def test_the_seed_decides_and_the_generator_is_left_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train(1, QUICK)
    assert torch.equal(before, torch.get_rng_state())
    same(first, train(1, QUICK))
    assert first.returns != train(2, QUICK).returns
    assert torch.equal(evaluate(first.policy, 5, seed=1), evaluate(first.policy, 5, seed=1))
    assert evaluate(first.policy, 5, seed=1).shape == (5,)


def test_progress_hears_of_every_update():
    heard = []
    run = train(1, QUICK, progress=lambda run: heard.append((run.updates, run.returns[-1])))
    assert heard == list(enumerate(run.returns, start=1))


def test_the_program_solves_a_seed_and_writes_its_table(tmp_path, capsys):
    assert main(["--seeds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 seeds" in printed
    assert (tmp_path / "table.md").read_text() in printed
    assert (tmp_path / "table.csv").read_text().startswith("seed,updates,env steps,training CPU s")


def test_ctrl_c_stops_at_an_update_and_leaves_a_checkpoint(tmp_path, capsys, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        "applications.rl.cartpole.show", lambda run: run.updates == 2 and signal.raise_signal(signal.SIGINT)
    )
    assert main(["--seeds", "2", "--out", str(tmp_path)]) == 130
    assert f"--resume {tmp_path / 'seed-0.pt'}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    with torch.random.fork_rng(devices=[]):
        assert load(tmp_path / "seed-0.pt").updates == 2


@pytest.mark.parametrize("name", ["policy", "optimizer"])
def test_a_checkpoint_holds_plain_data_only(tmp_path, name):
    file = tmp_path / "seed.pt"
    train(3, QUICK, should_stop=lambda: True, checkpoint=file)
    assert name in torch.load(file, weights_only=True)
