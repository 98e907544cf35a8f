"""No file of Python is longer than a reader holds in mind."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 400


@pytest.mark.parametrize("folder", ["scorefn", "applications", "tests"])
def test_no_file_is_longer(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert not {path: length for path, length in lengths.items() if length > MOST}
