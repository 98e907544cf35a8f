"""Where a value ends to be shown itself: a line of a hundred characters, and arrays that are none of ours."""

import pytest

from scorefn.core.representation import brief


class Line:
    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


@pytest.mark.parametrize(("text", "said"), [("x" * 100, "x" * 100), ("x" * 101, "Line"), ("x\nx", "Line"), ("", "")])
def test_a_line_of_a_hundred_characters_is_shown_and_a_longer_one_is_named(text, said):
    assert brief(Line(text)) == said


@pytest.mark.parametrize("name", ["ndim", "tolist"])
def test_half_an_array_is_no_array(name):
    half = Line("half")
    setattr(half, name, 2)
    assert brief(half) == "half"
