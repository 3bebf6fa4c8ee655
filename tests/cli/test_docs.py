"""README, WALK.md and CLI.md agree with the code."""

import itertools
import re

import pytest
from helpers import flags
from helpers.comparison import ROOT

from alchemy import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = (ROOT / "alchemy" / "WALK.md").read_text(encoding="utf-8")
STOPS = re.findall(r"\[([\w/]+\.py)\]\([\w/]+\.py\) `(\w+)`", WALK)
DOCUMENTS = ("README.md", "alchemy/WALK.md", "alchemy/GUIDE.md", "alchemy/CLI.md")


@pytest.mark.parametrize("file, name", STOPS)
def test_every_function_that_the_walk_names_is_defined_in_that_file(file, name):
    text = (ROOT / "alchemy" / file).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(def|class) {name}\b", text, re.M)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_to_a_file(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_readme_lists_every_flag_of_another_tool():
    for name in itertools.chain(*cli.OTHER_TOOLS.values()):
        assert re.search(rf"`--{name}[` ]", README), name


def test_the_table_of_flags_is_that_of_the_parsers():
    assert flags.CLI_MD.read_text(encoding="utf-8") == flags.document()
