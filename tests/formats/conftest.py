"""Fixtures of the tests of file formats: a tiny checkpoint, and LoRAs over all its layers."""

import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import vocabulary_read_once  # noqa: F401  used by every test here
from helpers.running import tiny  # noqa: F401
from helpers.spellings import fresh, pairs  # noqa: F401


@pytest.fixture
def copy(tiny, tmp_path):  # noqa: F811
    """A copy of the tiny checkpoint to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))
