"""Runs the Python blocks of the pages: each page is one namespace, read from top to bottom."""

import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

collect_ignore = ["conf.py"]


def start(namespace):
    torch.manual_seed(0)


pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md"], setup=start).pytest()
