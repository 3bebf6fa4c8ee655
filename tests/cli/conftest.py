"""The fixtures of helpers.running, for every file here."""

from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (  # noqa: F401
    drawn,
    inserted,
    lora_file,
    pictures,
    quick,
    taught,
    tiny,
)
