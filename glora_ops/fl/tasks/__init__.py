"""Models with data: the embedded digits, GLUE, SuperNI. A task knows nothing of clients."""

from .base import Task

__all__ = ["Task"]
