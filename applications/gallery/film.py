"""A film of a matplotlib figure: one GIF, small enough for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def frame(figure: Figure) -> Image.Image:
    """The figure as it stands."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")


def in_few_colours(pictures: Sequence[Image.Image], colours: int) -> list[Image.Image]:
    """All in one palette, that of some ten of them: what stands still then costs nothing in a GIF."""
    width, height = pictures[0].size
    chosen = [*pictures[:: max(1, len(pictures) // 8)], pictures[-1]]
    sample = Image.new("RGB", (width, height * len(chosen)))
    for i, picture in enumerate(chosen):
        sample.paste(picture, (0, i * height))
    palette = sample.quantize(colours)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def write_film(
    path: Path, pictures: Sequence[Image.Image], *, seconds: float = 0.12, hold: float = 2.0, colours: int = 48
) -> Path:
    """Write the GIF, which runs for ever; an old one is never left half overwritten.

    Args:
        path: ends in ``.gif``.
        pictures: of one size.
        seconds: that each of them stands.
        hold: the last one stands longer.
        colours: of all pictures together.

    Raises:
        ValueError: there is no picture, or their sizes differ.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(
            f"A film has pictures of one size, but these {len(pictures)} have the sizes {sorted(sizes)}: draw at least "
            "one, all of one figure."
        )
    part = path.with_suffix(".part")
    times = [round(1000 * seconds)] * (len(pictures) - 1) + [round(1000 * hold)]
    first, *others = in_few_colours(pictures, colours)
    first.save(part, format="GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    part.replace(path)
    return path


def film(
    path: Path, figure: Figure, show: Callable[[int], None], count: int, *, seconds: float = 0.12, hold: float = 2.0
) -> Path:
    """Write a GIF of a figure: ``show(i)`` puts it into its i-th state, i = 0, ..., count - 1."""
    pictures = []
    for i in range(count):
        show(i)
        pictures.append(frame(figure))
    return write_film(path, pictures, seconds=seconds, hold=hold)
