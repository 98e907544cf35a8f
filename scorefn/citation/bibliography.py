"""The sources: the ``.bib`` files beside this module, read when first asked for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

ENTRY = re.compile(r"@(\w+)\{([\w-]+),\n(.*?)\n\}", flags=re.DOTALL)
FIELD = re.compile(r"^  (\w+) = \{(.*)\},$", flags=re.MULTILINE)
VENUES = ("journal", "booktitle", "publisher", "institution", "howpublished")
DETAILS = {"volume": " {}", "edition": ", {} edition", "number": ", report {}", "version": "version {}"}
IDENTIFIERS = {"eprint": "arXiv:{}.", "doi": "doi:{}."}


@dataclass(frozen=True)
class Reference:
    """One source: an entry of a bibliography.

    Attributes:
        key: its name in BibTeX.
        kind: article, book, inproceedings, ...
        fields: name and value, in BibTeX's spelling, without the outer braces.

    Example:
        >>> import scorefn as sf
        >>> (reference,) = sf.cite(sf.LeaveOneOut).references
        >>> reference.key, reference["year"], reference.authors[0]
        ('kool2019buy', '2019', 'Kool, Wouter')
    """

    key: str
    kind: str
    fields: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> str:
        """The field as plain text; an empty text where there is none."""
        return dict(self.fields).get(name, "").strip("{}").replace(r"\&", "&")

    @property
    def authors(self) -> tuple[str, ...]:
        """Family name and given names, ``Kool, Wouter``; ``others`` where the list goes on."""
        return tuple(author.strip("{}") for author in dict(self.fields)["author"].split(" and "))

    @property
    def bibtex(self) -> str:
        """The entry."""
        return "\n".join(
            [f"@{self.kind}{{{self.key},", *(f"  {name} = {{{text}}}," for name, text in self.fields), "}"]
        )

    def __str__(self) -> str:
        """Authors (year). Title. Venue. Identifier."""
        names = [" ".join(reversed(author.split(", "))) for author in self.authors]
        if names[-1] == "others":
            people = ", ".join(names[:-1]) + " et al."
        else:
            people = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
        title = self["title"] + ("" if self["title"].endswith(("?", "!")) else ".")
        venue = [self[name] for name in VENUES if self[name]][:1]
        venue += [text.format(self[name]) for name, text in DETAILS.items() if self[name]]
        identifiers = [text.format(self[name]) for name, text in IDENTIFIERS.items() if self[name]]
        where = ["".join(venue) + "."] if venue else []
        return " ".join([f"{people} ({self['year']}).", title, *where, *identifiers])


def read(text: str) -> Iterator[Reference]:
    """The entries of a ``.bib`` file, written as the ones here are: one field per line, in braces."""
    for kind, key, body in ENTRY.findall(text):
        yield Reference(key, kind, tuple(FIELD.findall(body)))


@cache
def bibliography() -> dict[str, Reference]:
    """Every source of the library, by key."""
    texts = [file.read_text(encoding="utf-8") for file in files(__package__).iterdir() if file.name.endswith(".bib")]
    return {reference.key: reference for text in texts for reference in read(text)}
