"""Old names, until their last callers are changed."""

from .insertion_page import InsertionRecorder as Watcher  # noqa: F401
from .insertion_page import write_insertion_page as write_page  # noqa: F401
