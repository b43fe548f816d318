"""The version, in one place: the packaging and the command line read it without importing torch."""

__version__ = "0.1.0"
