"""Old names, until their last callers are changed."""

from .training_page import TrainingRecorder as Watcher  # noqa: F401
from .training_page import write_training_page as write_page  # noqa: F401
