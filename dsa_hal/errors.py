"""The errors a user can cause. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations


class DsaHalError(Exception):
    """Base of every error that the person at the keyboard can act on; the CLI prints it as one
    sentence and exits with code 2. Anything else that escapes is a bug and keeps its traceback."""


class BadInput(DsaHalError, ValueError):
    """An argument's shape, dtype or value does not fit what the op or the model documents."""


class CheckpointError(DsaHalError):
    """A checkpoint is missing, truncated, or disagrees with its own config.json."""


class ConfigError(DsaHalError, ValueError):
    """A config, environment variable or option holds a value that is not known here."""


class Absent(DsaHalError):
    """A backend, device or package was asked for by name and is not here."""
