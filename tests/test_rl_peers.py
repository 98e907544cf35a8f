"""The benchmark beside the peers, as far as it runs without them."""

import json

import pytest
import torch

from applications.benchmarks.rl_peers import __main__ as program
from applications.benchmarks.rl_peers import learners, page
from applications.benchmarks.rl_peers import watch as clocks


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("steps", [None, 40])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_hand_written_loop_does_the_same_work(steps, updates):
    options = {"hidden": (8,), "num_envs": 5, "steps": steps}
    assert learners.gradient_difference(0, updates, **options) < learners.TOLERANCE


def test_another_algorithm_is_noticed(monkeypatch):
    monkeypatch.setattr(learners, "race", lambda logits: logits.argmax(-1))
    with pytest.raises(AssertionError, match=r"scorefn took \[\d+\] environment steps, the hand-written loop \[\d+\]"):
        learners.gradient_difference(0, hidden=(8,), num_envs=5)


def test_evaluation_knows_the_return_of_a_policy_and_leaves_the_generator_alone():
    generator = torch.get_rng_state()
    balanced = clocks.evaluate(lambda seen: (seen[:, 2] + seen[:, 3] > 0).long(), 10, seed=0)
    fallen = clocks.evaluate(lambda seen: torch.zeros(len(seen), dtype=torch.long), 10, seed=0)
    assert balanced > 150
    assert 8 <= fallen <= 11  # always to the left
    assert torch.equal(generator, torch.get_rng_state())


def test_the_watch_stands_still_while_the_policy_is_judged(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(clocks.time, "process_time", lambda: clock[0])
    means = iter([100.0, 480.0, 470.0, 490.0, 491.0])

    def slow_evaluate(act, episodes, seed):
        clock[0] += 1000.0
        return next(means)

    monkeypatch.setattr(clocks, "evaluate", slow_evaluate)
    watch = clocks.Watch(judged=True).start()
    stops = []
    for env_steps in (600, 1200, 1800, 2400, 3600):
        clock[0] += 1.0
        stops.append(watch.after(env_steps, lambda seen: seen))
    # looked at after 1200 (100), 2400 (480, but not confirmed) and 3600 (490, confirmed by 491)
    assert stops == [False, False, False, False, True]
    assert watch.result() | {"wall": 0.0} == {
        "env_steps": 3600,
        "updates": 5,
        "cpu": 5.0,
        "wall": 0.0,
        "looks": 3,
        "solved": True,
        "confirmed": 491.0,
    }


@pytest.mark.parametrize(("limits", "updates"), [({"max_steps": 250}, 3), ({"max_updates": 2}, 2)])
def test_the_watch_has_limits(limits, updates):
    watch = clocks.Watch(**limits).start()
    env_steps = 100
    while not watch.after(env_steps, lambda seen: seen):
        env_steps += 100
    assert watch.updates == updates
    assert not watch.solved


def test_a_peer_that_is_missing_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == "tianshou" else object())
    with pytest.raises(SystemExit, match=r"tianshou cannot be found.*pip install torch tianshou gymnasium.*--peers"):
        program.main(["--peers", "all"])


def test_an_unknown_peer_is_refused():
    with pytest.raises(SystemExit, match="'rllib' is not one of all, none, sb3, tianshou, torchrl"):
        program.peers_asked("sb3,rllib")


def test_seeds_that_do_not_arrive_count_as_infinity():
    row = {"env_steps": 1000, "cpu": 1.0, "wall": 2.0, "solved": True, "confirmed": 480.0}
    failed = row | {"solved": False, "confirmed": None}
    (some, none) = page.threshold_table({"a": [row, failed, row | {"confirmed": 476.0}], "b": [failed]})[2:]
    assert some == "| a | 2 of 3 | 1,000 (1,000 – –) | 1.00 (1.00 – –) | 2.00 (2.00 – –) | 476.0 |"
    assert none == "| b | 0 of 1 | – | – | – | – |"


def test_the_page(tmp_path, capsys):
    program.main(["--peers", "none", "--quick", "--out", str(tmp_path), "--date", "2026-11-21"])
    text = (tmp_path / "rl_peers.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "Measured 2026-11-21" in text
    assert "no peers" in text
    assert "falls short" in text
    measured = json.loads((tmp_path / "rl_peers.json").read_text())
    by_name = {name: rows[0] for name, rows in measured["throughput"].items()}
    assert len(by_name) == 4
    for how in ("whole episodes", "segments of 128 steps"):
        ours, by_hand = by_name[f"scorefn, {how}"], by_name[f"hand-written loop, {how}"]
        assert (ours["env_steps"], ours["updates"]) == (by_hand["env_steps"], by_hand["updates"])
