"""Every program under applications/ that has a command has a page in the gallery, with a picture and what to change."""

import re
from pathlib import Path

import pytest

from applications.rl import table

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "gallery").glob("*.md"))}
LARGEST = 500_000  # bytes that a picture may have
ROOMS = ("bbo", "graphs", "rl", "tour", "vi")


def commands():
    """What is written behind ``python -m`` to run each program."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / "applications" / room).glob("*.py")):
            if re.search(r"^if __name__ == \"__main__\":", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
    return found


def pages_of(command):
    return [name for name, text in PAGES.items() if re.search(rf"python -m {re.escape(command)}(?![\w.])", text)]


def applications():
    return sorted(set(PAGES) - {"index"})


def test_the_programs_are_found():
    found = commands()
    assert {"applications.tour", "applications.rl.1_reinforce", "applications.vi.survey"} <= set(found)
    assert not [name for name in found if name.endswith("__main__")]


@pytest.mark.parametrize("command", commands())
def test_a_page_names_the_command(command):
    assert pages_of(command), f"no page of docs/gallery has `python -m {command}`"


@pytest.mark.parametrize("name", applications())
def test_a_page_says_what_to_change_and_shows_a_picture(name):
    text = PAGES[name]
    assert re.search(r"^##+ What to change first", text, flags=re.MULTILINE)
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    for picture in pictures:
        path = ROOT / "docs" / "gallery" / picture
        assert path.is_file(), picture
        assert path.stat().st_size <= LARGEST, picture


def test_the_index_leads_to_every_page():
    index = PAGES["index"]
    toctree = re.search(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL)[1]
    listed = [line for line in toctree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == applications()
    thumbnails = dict(re.findall(r"```\{image\} (\S+)\n(?: +:alt:.*\n)? +:target: (\w+)\.html\n", index))
    assert sorted(thumbnails.values()) == applications()
    for picture, name in thumbnails.items():
        assert (ROOT / "docs" / "gallery" / picture).is_file(), picture  # no picture from the network
        assert f"]({picture})" in PAGES[name]


def test_the_table_of_tasks_leaves_the_rest_of_its_page_alone(tmp_path, monkeypatch, capsys):
    found = {"env_steps": 10, "cpu_seconds": 2.0, "eval_greedy_mean": 500.0, "episodes_evaluated": 7}
    monkeypatch.setattr(table, "run", lambda row, seed, out: found | {"eval_sampled_mean": 480.0 + seed})
    page = tmp_path / "rl.md"
    page.write_text(PAGES["rl"], encoding="utf-8")
    assert table.main(["--seeds", "2", "--only", "CartPole-v1-rloo", "--page", str(page)]) == 0
    before, after = PAGES["rl"], page.read_text(encoding="utf-8")
    marks = ["<!-- tasks: written by the program -->", "<!-- tasks: end -->"]
    assert after.split(marks[0])[0] == before.split(marks[0])[0]
    assert after.split(marks[1])[1] == before.split(marks[1])[1]
    section = after.split(marks[0])[1].split(marks[1])[0]
    rows = [line for line in section.splitlines() if line.startswith("| CartPole-v1 ")]
    assert len(rows) == 1
    assert "| 480, 481 |" in rows[0]
    assert "7 fresh episodes" in section
    assert rows[0] in capsys.readouterr().out
