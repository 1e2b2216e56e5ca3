"""Errors a user can act on: what is wrong, the value found, and the argument that mends it."""

from __future__ import annotations


class EvercellError(Exception):
    """Base of every error that evercell raises on purpose.

    Parameters
    ----------
    message
        What is wrong, the value found and what was expected; file and key names in backticks.
    hint
        One line that names the argument or command that mends it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class CellsError(EvercellError):
    """A file or AnnData does not hold usable cells or counts."""


class GenesError(EvercellError):
    """Genes cannot be matched to the model's genes."""


class LabelsError(EvercellError):
    """Cell type labels are missing or cannot be used."""


class ModelError(EvercellError):
    """A model directory is missing, damaged, or of a format that cannot be read."""


class OutputError(EvercellError):
    """An output cannot be written: no folder, no room, no permission, or another process is writing it."""


class FullDiskError(OutputError):
    """There is no room for an output."""


class SettingsError(EvercellError):
    """A setting has a value that cannot be used."""


class MemoryWarning(UserWarning):
    """Memory ran out, and the work goes on in a slower way."""


class GateError(EvercellError):
    """An update would make the model worse at types that it knows, so it was not published."""


def words_of(error: Exception, *, most: int = 300) -> str:
    """What another library says of an error, on one line and cut off; the name of its class where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def class_and_words(error: Exception) -> str:
    """The class of an error that nobody foresaw, and what it says."""
    name, words = type(error).__name__, words_of(error)
    return name if words == name else f"{name}: {words}"
