"""Whether the parts of a stored model fit one another: a directory can be made by anybody, with hashes that are right.

What is said in ``annotator.json`` is held against the arrays that are there before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from evercell.annotator import Annotator
from evercell.bank import ExampleBank
from evercell.errors import ModelError

Module = TypeVar("Module", bound=nn.Module)
ENDLESS = ("linear.ceiling", "rejector.")  # where infinity means no ceiling, and no cell that is rejected
AGAIN = "get it again, from somebody you trust"


def check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    """Check that every number is one.

    Raises
    ------
    ModelError
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ModelError(f"`{name}` holds values of type {array.dtype}", hint=AGAIN)
        odd = (np.isnan if name.startswith(ENDLESS) else lambda values: ~np.isfinite(values))(array)
        if odd.any():
            raise ModelError(f"`{name}` holds {int(odd.sum()):,} values that are no numbers", hint=AGAIN)


def check_counted(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check that a part does not ask for more layers than there are arrays: they are made one after the other.

    Raises
    ------
    ModelError
    """
    for name, value in settings.items():
        if name in ("depth", "members", "n_latents", "n_heads") and not (isinstance(value, int) and value >= 1):
            raise ModelError(f"`{name}` is {str(value)[:60]}; a whole number from 1 was expected", hint=AGAIN)
        most = len(value) if isinstance(value, list) else value if name in ("depth", "members") else 0
        if most > len(arrays):
            raise ModelError(f"`{name}` asks for {most:,} layers, and {len(arrays):,} arrays are stored", hint=AGAIN)


class _Undrawn(TorchFunctionMode):
    """Weights are not drawn: for tensors without memory torch would first import its compiler, seconds of a start."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function in (nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else named["tensor"]
        return function(*args, **named)


def made(make: Callable[[], Module], arrays: Mapping[str, np.ndarray], *, name: str) -> Module:
    """A module with stored weights, made only if it has the shapes of these: what it asks for may be enormous.

    Raises
    ------
    ModelError
        Its arrays are others.
    """
    with torch.device("meta"), _Undrawn():
        expected = {key: tuple(value.shape) for key, value in make().state_dict().items()}
    found = {key: array.shape for key, array in arrays.items()}
    if expected != found:
        odd = min(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        shapes = [str(of[odd]) if odd in of else "nothing" for of in (found, expected)]
        raise ModelError(f"`{name}.{odd}` is {shapes[0]}, and {shapes[1]} was expected", hint=AGAIN)
    module = make()
    module.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    return module.eval()


def check_parts(model: Annotator) -> None:
    """Check shapes and ranges of what is beside the transformer.

    Raises
    ------
    ModelError
    """
    n_genes, n_types = len(model.vocabulary), len(model.types)
    _check(0 < model.temperature < math.inf, f"the temperature is {model.temperature}")
    _check(0 <= model.linear_share <= 1, f"the linear member's share is {model.linear_share}")
    if (linear := model.linear) is not None:
        _check_shapes(
            linear.arrays(), "linear",
            weight=(n_genes, n_types), bias=(n_types,), centre=(n_genes,), ceiling=(n_genes,),
        )  # fmt: skip
    if (profiles := model.profiles) is not None:
        n_markers = len(profiles.genes)
        _check_shapes(
            profiles.arrays(), "profiles",
            genes=(n_markers,), means=(n_markers, n_types), depth=(n_genes,), known=(n_types,),
        )  # fmt: skip
        _check_range(profiles.genes, n_genes, "profiles.genes")
        _check(0 <= profiles.share <= 1, f"the profiles' share is {profiles.share}")
        _check(0 < profiles.sharpness < math.inf, f"the profiles' sharpness is {profiles.sharpness}")
    for name, bank in (("bank.h5ad", model.bank), ("sealed.h5ad", model.sealed)):
        if bank is not None:
            _check_bank(bank, n_genes, n_types, len(model.ledger), name)
    if (sketch := model.sketch) is not None:
        _check_range(sketch.codes, n_types, "the types of sketch.safetensors")
        n = len(sketch.codes)
        for part in ("shares", "dispersions", "measured"):
            _check(getattr(sketch, part).shape == (n, n_genes), f"`{part}` of sketch.safetensors has another shape")


def _check_bank(bank: ExampleBank, n_genes: int, n_types: int, n_stages: int, name: str) -> None:
    n_cells = bank.counts.shape[0]
    _check(bank.counts.shape == (n_cells, n_genes), f"`{name}` has {bank.counts.shape[1]:,} genes, and not {n_genes:,}")
    _check(bank.measured.ndim == 2 and bank.measured.shape[1] == n_genes, f"`measured` of `{name}` has another shape")
    for part, most in (("codes", n_types), ("stages", n_stages + 1), ("studies", len(bank.measured))):
        _check(getattr(bank, part).shape == (n_cells,), f"`{part}` of `{name}` are not one a cell")
        _check_range(getattr(bank, part), most, f"`{part}` of `{name}`")
    counts = bank.counts.data
    _check(bool(np.isfinite(counts).all() and (counts >= 0).all()), f"`{name}` holds values that are no counts")


def _check_shapes(arrays: Mapping[str, np.ndarray], part: str, **expected: tuple[int, ...]) -> None:
    for name, array in arrays.items():
        _check(
            array.shape == expected[name],
            f"`{part}.{name}` has the shape {array.shape}, and {expected[name]} was expected",
        )


def _check_range(numbers: np.ndarray, most: int, what: str) -> None:
    _check(numbers.dtype.kind in "iu", f"{what} are of type {numbers.dtype}")
    if len(numbers):
        least, largest = int(numbers.min()), int(numbers.max())
        _check(0 <= least <= largest < most, f"{what} go from {least:,} to {largest:,}; 0 to {most - 1:,} was expected")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ModelError(problem, hint=AGAIN)
