"""The program: its task, its model, reproducible, resumed bit for bit, and it leaves global state alone."""

import json
import signal

import pytest
import torch

from applications.rl import sequence
from applications.rl.sequence import CONFIGS, END, LENGTH, START, Config, Writer, evaluate, load, main, reward, train

QUICK = {
    method: Config(method=method, prompts=4, group=3, steps=config.steps, hidden=8, evaluated=8, max_updates=6)
    for method, config in CONFIGS.items()
}


def padded(*symbols):
    return torch.tensor([[*symbols, *[END] * (LENGTH - len(symbols))]])


@pytest.mark.parametrize(
    ("response", "share"),
    [
        (padded(5, 9, 7), 1.0),
        (padded(5, 9, 8), 3 / 4),
        (padded(5, 9, 7, 7), 3 / 5),
        (padded(5, 9), 2 / 4),
        (padded(), 0.0),
        (torch.tensor([[5, 9, 7, END, 4, 4, 4, 4]]), 1.0),  # what follows the end does not count
        (torch.full((1, LENGTH), START), 0.0),
        (torch.tensor([[5, 9, 7, 7, 7, 7, 7, 7]]), 3 / 8),
    ],
)
def test_the_reward_is_the_share_of_right_places(response, share):
    assert reward(padded(5, 9, 7), response).tolist() == pytest.approx([share])


def test_what_is_written_is_what_is_scored():
    model = Writer(8)
    prompts = sequence.new_prompts(4000)
    assert ((prompts == END).sum(-1) >= 1).all()
    assert (prompts[:, :3] != END).all()
    responses = model.write(prompts)
    first = (responses[:, 0].unsqueeze(-1) == torch.arange(16)).double().mean(0)
    before = torch.full((4000, 1), START)
    chance = model.log_softmax(prompts, before)[0].exp().detach()[:, 0].double().mean(0)
    assert (first - chance).abs().max() < 5 * (0.25 / 4000) ** 0.5
    stepwise, state = [], None
    for token in [before, *responses[:, :-1].split(1, -1)]:
        log_prob, state = model.log_softmax(prompts, token, state)
        stepwise.append(log_prob)
    chosen = torch.cat(stepwise, 1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(chosen, model(prompts, responses), atol=1e-5)
    assert torch.equal(model.write(prompts, greedy=True), model.write(prompts, greedy=True))


def same(a, b):
    assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))
    for one, other in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (a.seed, a.config, a.updates, a.rewards, a.evaluated) == (
        b.seed,
        b.config,
        b.updates,
        b.rewards,
        b.evaluated,
    )
    assert (a.degenerate, a.sample_size, a.clipped) == (b.degenerate, b.sample_size, b.clipped)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, method):
    file = tmp_path / "runs" / "seed.pt"
    through = train(3, QUICK[method])
    assert through.updates == 6
    asked = iter([False, False, True])
    stopped = train(3, QUICK[method], should_stop=lambda: next(asked), checkpoint=file)
    assert stopped.updates == 3
    torch.manual_seed(99)  # what happens in between does not matter
    same(through, train(0, resume=file))


def test_the_seed_decides_and_the_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    first = train(1, QUICK["rloo"])
    same(first, train(1, QUICK["rloo"]))
    assert first.rewards != train(2, QUICK["rloo"]).rewards
    assert torch.equal(evaluate(first.model, 5, seed=1), evaluate(first.model, 5, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_the_second_step_is_off_policy():
    run = train(0, QUICK["grpo"])
    assert all(1 <= size < 12 for size in run.sample_size)
    assert train(0, QUICK["rloo"]).sample_size == pytest.approx([12.0] * 6)


def test_it_learns():
    run = train(0, Config(max_updates=60))
    assert sum(run.rewards[-10:]) / 10 > sum(run.rewards[:10]) / 10 + 0.1


def test_the_program_writes_table_curve_and_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CONFIGS, "grpo", QUICK["grpo"])
    assert main(["--method", "grpo", "--seed", "4", "--seeds", "2", "--out", str(tmp_path)]) == 1  # it did not learn
    printed = capsys.readouterr().out
    assert "0 of 2 seeds" in printed
    assert (tmp_path / "table.md").read_text() in printed
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "result.json").read_text())
    assert [run["seed"] for run in told["runs"]] == [4, 5]
    assert told["config"]["method"] == "grpo"
    assert {"cpu_seconds", "wall_seconds", "eval_sampled_mean", "eval_sampled_std", "eval_greedy_mean"} < {
        *told["runs"][0]
    }


def test_ctrl_c_stops_at_an_update_and_leaves_a_checkpoint(tmp_path, capsys, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setitem(CONFIGS, "rloo", QUICK["rloo"])
    monkeypatch.setattr(sequence, "show", lambda run: run.updates == 2 and signal.raise_signal(signal.SIGINT))
    assert main(["--out", str(tmp_path)]) == 130
    assert f"--resume {tmp_path / 'seed-0.pt'}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    with torch.random.fork_rng(devices=[]):
        assert load(tmp_path / "seed-0.pt").updates == 2
    assert main(["--resume", str(tmp_path / "seed-0.pt"), "--out", str(tmp_path)]) == 1  # it did not learn
