"""Read a pickle without running what is in it: every object becomes a record, every array is made here from its bytes.

A pickle is a program: it names functions and calls them. Here names lead to stand-ins of this module only, so that no
code of numpy, scikit-learn or anything else is reached; a name that is not listed is refused. What a hostile file can
still do is waste memory.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from evercell.errors import ModelError, words_of

KINDS = frozenset("biufSU")
"""Kinds of arrays that are made from bytes; arrays of objects are lists in the pickle."""


class Record:
    """Stands for an object of a class of another program; `fields` are its attributes."""

    def __new__(cls, *arguments: object, **keywords: object) -> Record:
        made = super().__new__(cls)
        made.fields = {}
        return made

    fields: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state:
            state = state[0]
        if isinstance(state, dict):
            self.fields = {str(name): value for name, value in state.items()}


class Classifier(Record):
    """scikit-learn's LogisticRegression or SGDClassifier."""


class Scaler(Record):
    """scikit-learn's StandardScaler."""


class Model(Record):
    """CellTypist's Model."""


class _Type:
    """A numpy dtype."""

    def __init__(self, text: str, *_: object) -> None:
        self.text, self.order = str(text), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("arrays with fields are not read")
        self.order = str(state[1]).replace("|", "=")

    def found(self) -> np.dtype[Any]:
        made = np.dtype("O") if self.text.startswith("O") else np.dtype(self.order + self.text.lstrip("<>=|"))
        if made.kind not in KINDS and made.kind != "O":
            raise pickle.UnpicklingError(f"arrays of `{self.text}` are not read")
        return made


class _Array:
    """A numpy array."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        self.value = _made(data, kind.found(), shape, "F" if by_columns else "C")


def _made(data: Any, kind: np.dtype[Any], shape: tuple[int, ...], order: Any) -> np.ndarray:
    if kind.kind == "O":
        flat = np.empty(len(data), dtype=object)
        flat[:] = data
    else:
        flat = np.frombuffer(data.encode("latin-1") if isinstance(data, str) else bytes(data), dtype=kind)
    return flat.reshape(shape, order=order)


def _empty_array(*_: object) -> _Array:
    return _Array()


def _array(data: Any, kind: _Type, shape: tuple[int, ...], order: str, *_: object) -> _Array:
    made = _Array()
    made.value = _made(data, kind.found(), shape, order)
    return made


def _scalar(kind: _Type, data: Any = b"") -> Any:
    return data if kind.found().kind == "O" else _made(data, kind.found(), (1,), "C")[0].item()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """What older pickles write bytes as."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in `{encoding}` is not read")
    return text.encode("latin-1")


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    **{(module, "_reconstruct"): _empty_array for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _array for module in _NUMERIC},
    **{(f"sklearn.linear_model.{module}", "LogisticRegression"): Classifier for module in ("_logistic", "logistic")},
    **{
        (f"sklearn.linear_model.{module}", "SGDClassifier"): Classifier
        for module in ("_stochastic_gradient", "stochastic_gradient")
    },
    **{(f"sklearn.preprocessing.{module}", "StandardScaler"): Scaler for module in ("_data", "data")},
    ("celltypist.models", "Model"): Model,
    # What classifiers may carry with them and nobody here asks for: their loss, their random state.
    ("sklearn._loss._loss", "CyHalfBinomialLoss"): Record,
    ("sklearn.linear_model._sgd_fast", "Log"): Record,
    ("sklearn.linear_model.sgd_fast", "Log"): Record,
    ("numpy.random._pickle", "__randomstate_ctor"): Record,
    ("numpy.random._pickle", "__bit_generator_ctor"): Record,
    ("numpy.random._mt19937", "MT19937"): Record,
}


class _Reader(pickle.Unpickler):
    """Unpickler that knows the names of `STAND_INS` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in of a name.

        Raises
        ------
        UnpicklingError
            If it has none.
        """
        if (module, name) not in STAND_INS:
            raise _Unknown(f"{module}.{name}")
        return STAND_INS[module, name]


class _Unknown(pickle.UnpicklingError):
    """A name that has no stand-in."""


def read_records(path: Path) -> Any:
    """What a pickle holds: records, plain values, and arrays, which are to be had by `array`.

    Raises
    ------
    ModelError
        If the file names anything else, which is then told, or is no pickle.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(stream).load()
    except _Unknown as error:
        raise ModelError(
            f"`{path}` asks for `{error}`, which is no part of a CellTypist model: it was refused and nothing was run",
            hint="take the file from its source again; models are a dict of classifier, scaler and description",
        ) from error
    except Exception as error:  # a damaged pickle raises errors of any class
        what = words_of(error)
        raise ModelError(f"`{path}` cannot be read as a pickle: {what}", hint="copy or download it again") from error


def array(value: Any) -> np.ndarray | None:
    """The array that a value stands for; of a list, an array of it; None for anything else."""
    if isinstance(value, _Array) and hasattr(value, "value"):
        return value.value
    return np.asarray(value) if isinstance(value, list | tuple) else None
