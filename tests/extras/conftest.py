"""The fixtures of helpers.running and helpers.training, for every file here."""

from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import drawn, inserted, lora_file, quick, taught, tiny  # noqa: F401
from helpers.training import model, stopped  # noqa: F401
