"""The model directory: JSON, text, safetensors and h5ad; written whole or not at all, nothing in it is executed.

::

    model/ annotator.json  genes.txt  weights.safetensors  bank.h5ad  sealed.h5ad  ledger.jsonl  MODEL_CARD.md
           sketch.safetensors
           stages/1/ ...   the model as it was after earlier stages, for `revert`

`sealed.h5ad` is not there in models that keep no sealed cells, `sketch.safetensors` not in those without sketched
stages, `stages` not in those of one stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evercell import __version__
from evercell.annotator import EVEN, Annotator
from evercell.backbones import BACKBONES
from evercell.bank import ExampleBank
from evercell.celltypes import CellTypes
from evercell.errors import EvercellError, ModelError, words_of
from evercell.genes import GeneVocabulary
from evercell.h5_files import write_h5ad
from evercell.heads import GrowingHead
from evercell.label_sets import LabelSets
from evercell.ledger import Ledger
from evercell.linear import LinearModel
from evercell.locking import PATIENCE, locked
from evercell.outputs import atomic_path, check_folder, check_model_output, is_model, put_back
from evercell.profiles import ProfileModel
from evercell.rejection import REJECTORS
from evercell.sketches import Sketch
from evercell.soundness import check_arrays, check_counted, check_parts, made
from evercell.stored_cells import sound
from evercell.tokenizers import TOKENIZERS
from evercell.vetting import vet_hdf5

FORMAT = 1
FORMAT_WITH_SKETCH = 2  # a reader that does not know of sketches would forget what they hold
FORMAT_WITH_SCALED = 3  # linear members with a centre and a ceiling, or with a share of their own
FORMAT_WITH_PROFILES = 4  # a reader that does not know of profiles would label cells without them
FORMAT_WITH_SETS = 5  # one that does not know of label sets would find the fingerprint wrong
FILES = ("genes.txt", "weights.safetensors", "bank.h5ad", "ledger.jsonl")
SEALED = "sealed.h5ad"
SKETCH = "sketch.safetensors"
STAGES = "stages"


def save(
    annotator: Annotator,
    path: str | os.PathLike[str],
    *,
    card: str = "",
    overwrite: bool = False,
    previous: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model directory.

    Parameters
    ----------
    annotator
        The model.
    path
        Directory to be made; it appears whole or not at all.
    card
        Text of ``MODEL_CARD.md``.
    overwrite
        Replace a model that is there.
    previous
        Directory of the model that this one was made from; kept in ``stages``, with the stages that it keeps itself.

    Raises
    ------
    ModelError
        If something other than an empty folder is at `path` (a model may be replaced), or `previous` is not the model
        that this one was made from.
    OutputError
        If it cannot be written there, or another process writes it.
    """
    path = Path(path)
    check_model_output(path, overwrite=overwrite)
    check_folder(path)
    with locked(path, patience=PATIENCE, again=True):
        check_model_output(path, overwrite=overwrite)
        with atomic_path(path) as folder:
            folder.mkdir()
            _write(annotator, folder, card)
            if previous is not None:
                _keep_stages(Path(previous), folder, annotator.ledger)
    return path


def stages_kept(path: str | os.PathLike[str]) -> list[int]:
    """Numbers of the earlier stages that a model directory keeps."""
    folder = Path(path) / STAGES
    if not folder.is_dir():
        return []
    return sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal() and is_model(one))


def load_stage(path: str | os.PathLike[str], stage: int, *, now: Annotator) -> Annotator:
    """Read an earlier stage that the directory of the model `now` keeps.

    Raises
    ------
    ModelError
        If it cannot be read, or is not that stage of this model.
    """
    source = Path(path) / STAGES / str(stage)
    then = load(source)
    if not len(then.ledger) == stage < len(now.ledger) or then.ledger.head != now.ledger.stages[stage - 1].digest:
        raise ModelError(f"`{source}` is not stage {stage} of the model `{path}`", hint="copy the model again")
    return then


def revert(
    path: str | os.PathLike[str], stage: int, output: str | os.PathLike[str], *, overwrite: bool = False
) -> Annotator:
    """Write the model as it was after an earlier stage, with the stages before that one.

    Raises
    ------
    ModelError
        If the directory does not keep that stage, or what it keeps is not that stage of this model.
    """
    folder, kept = Path(path), stages_kept(path)
    now = load(folder)
    source = folder / STAGES / str(stage)
    if stage not in kept:
        there = ", ".join(map(str, kept)) or "none"
        raise ModelError(
            f"`{folder}` is at stage {len(now.ledger)} and does not keep stage {stage}; earlier stages kept: {there}",
            hint="name one of these with --stage, or use the directory that the update was made from",
        )
    then = load_stage(folder, stage, now=now)
    card = (source / "MODEL_CARD.md").read_text(encoding="utf-8")
    save(then, output, card=card, overwrite=overwrite, previous=folder)
    return then


def _keep_stages(previous: Path, folder: Path, ledger: Ledger) -> None:
    """Copy a model and the stages that it keeps into the ``stages`` of another, those before its last stage."""
    before, below = load(previous).ledger, len(ledger)
    own = len(before)
    if 0 < own < below and ledger.stages[own - 1].digest != before.head:
        raise ModelError(
            f"the model `{previous}` has changed since this one was made from it: stage {own} is another",
            hint="run the update again, with the model as it is now",
        )
    sources = {stage: previous / STAGES / str(stage) for stage in stages_kept(previous)} | {own: previous}
    for stage, source in sources.items():
        if stage < below:
            target = folder / STAGES / str(stage)
            target.mkdir(parents=True)
            for file in source.iterdir():
                if file.is_file() and not file.is_symlink():
                    shutil.copyfile(file, target / file.name)


def _write(annotator: Annotator, folder: Path, card: str) -> None:
    from safetensors.numpy import save as as_bytes

    (folder / "genes.txt").write_text(annotator.vocabulary.to_text(), encoding="utf-8")
    (folder / "ledger.jsonl").write_text(annotator.ledger.to_text(), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    arrays = {name: _smallest(array) for name, array in annotator.weights().items()}
    # As bytes: `save_file` makes a file that only its owner can read, and a model is there to be shared.
    (folder / "weights.safetensors").write_bytes(as_bytes(arrays))
    _write_bank(annotator.bank, annotator, folder / "bank.h5ad")
    files: tuple[str, ...] = FILES
    if annotator.sealed is not None:
        _write_bank(annotator.sealed, annotator, folder / SEALED)
        files = (*files, SEALED)
    sketched: dict[str, Any] = {}
    if annotator.sketch is not None:
        sketched = {"sketch": annotator.sketch.facts(annotator.types.names)}
        (folder / SKETCH).write_bytes(as_bytes(annotator.sketch.arrays()))
        files = (*files, SKETCH)
    description: dict[str, Any] = {
        "format": _format(annotator.parts(), sketched=bool(sketched)),
        "evercell": __version__,
        **annotator.parts(),
        **sketched,
        "settings": dict(annotator.settings),
        "fingerprint": annotator.fingerprint,
        "ledger_head": annotator.ledger.head,
        "sha256": {name: _digest(folder / name) for name in files},
    }
    description["sha256"]["annotator.json"] = _own_digest(description)
    (folder / "annotator.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")


def _smallest(array: np.ndarray) -> np.ndarray:
    """The array in half precision where that loses nothing, as after `Annotator.halved`."""
    array = np.ascontiguousarray(array)
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def _write_bank(bank: ExampleBank, annotator: Annotator, path: Path) -> None:
    import anndata as ad
    import pandas as pd

    counts = bank.counts.copy()
    if np.array_equal(counts.data, np.floor(counts.data)) and counts.data.max(initial=0) < 2**32:
        counts.data = counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0))))
    names = np.asarray(annotator.types.names, dtype=object)
    obs = pd.DataFrame(
        {"cell_type": names[bank.codes], "stage": bank.stages, "study": bank.studies},
        index=[str(i) for i in range(len(bank))],
    )
    var = pd.DataFrame({"symbol": list(annotator.vocabulary.symbols)}, index=list(annotator.vocabulary.names))
    stored = ad.AnnData(counts, obs=obs, var=var, varm={"measured": bank.measured.T.copy()})
    write_h5ad(path, stored, compression="gzip")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_digest(description: dict[str, Any]) -> str:
    """SHA-256 of annotator.json without this hash itself (hex)."""
    hashes = {name: value for name, value in description["sha256"].items() if name != "annotator.json"}
    return hashlib.sha256(json.dumps({**description, "sha256": hashes}, sort_keys=True).encode()).hexdigest()


def load(path: str | os.PathLike[str], *, device: torch.device | None = None) -> Annotator:
    """Read a model directory. Nothing in it is executed or unpickled.

    Raises
    ------
    ModelError
        If the directory is no model, is damaged, or was written by a newer version.
    """
    folder = Path(path)
    put_back(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no model at `{folder}`", hint="`evercell train` makes one")
    description = _description(folder)
    try:
        annotator = _read(folder, description)
    except ModelError:
        raise
    except Exception as error:  # every part has errors of its own; to the user they are one
        what, hint = f" ({words_of(error)})", None
        if isinstance(error, EvercellError):
            what, hint = f": {' '.join(error.message.split())[:300]}", error.hint
        raise ModelError(
            f"the model `{folder}` cannot be read{what}", hint=hint or "copy it again, or train it again"
        ) from error
    if annotator.fingerprint != description.get("fingerprint") or annotator.ledger.head != description.get(
        "ledger_head"
    ):
        raise ModelError(
            f"the model `{folder}` was changed: its parts do not fit its fingerprint", hint="copy it again"
        )
    return annotator if device is None else annotator.on(device)


def _description(folder: Path) -> dict[str, Any]:
    """Content of annotator.json, with the files it speaks of checked against their hashes."""
    own = folder / "annotator.json"
    if not own.exists():
        raise ModelError(f"`{folder}` is no model: it has no annotator.json", hint="give the folder of a model")
    _check_plain(own)
    try:
        description: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
        written, hashes = int(description["format"]), dict(description.get("sha256", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"`{own}` cannot be read ({words_of(error)})", hint="copy it again") from error
    if written < FORMAT or isinstance(description["format"], bool):
        raise ModelError(
            f"`{own}` cannot be read: format {description['format']} was never written", hint="copy it again"
        )
    newest = _format(description, sketched=SKETCH in hashes)
    if written > newest:
        raise ModelError(
            f"the model `{folder}` has format {written}; this evercell ({__version__}) knows up to {newest}",
            hint="pip install --upgrade evercell",
        )
    found = {"annotator.json": _own_digest({**description, "sha256": hashes})}
    for name in (*FILES, *(one for one in (SEALED, SKETCH) if one in hashes)):
        _check_plain(folder / name)
        found[name] = _digest(folder / name)
    for name, digest in found.items():
        if digest != hashes.get(name):
            raise ModelError(f"the model `{folder}` is damaged: `{name}` was changed or cut off", hint="copy it again")
    return description


def _format(parts: dict[str, Any], *, sketched: bool) -> int:
    """Version of the layout: the oldest that has room for what the model holds, so that older readers take the rest."""
    if "sets" in parts:
        return FORMAT_WITH_SETS
    if "profiles" in parts:
        return FORMAT_WITH_PROFILES
    if "linear_scaled" in parts or "linear_share" in parts:
        return FORMAT_WITH_SCALED
    return FORMAT_WITH_SKETCH if sketched else FORMAT


def _check_plain(file: Path) -> None:
    """A part of a model is a file of its own: what a link leads to may change under the model."""
    if file.is_symlink():
        raise ModelError(f"the model `{file.parent}` is damaged: `{file.name}` is a link", hint="copy the file itself")
    if not file.is_file():
        raise ModelError(f"the model `{file.parent}` is damaged: `{file.name}` is missing", hint="copy it again")


def _read(folder: Path, description: dict[str, Any]) -> Annotator:
    from safetensors.numpy import load_file

    vocabulary = GeneVocabulary.from_text((folder / "genes.txt").read_text(encoding="utf-8"))
    types = CellTypes.from_dict(description["types"])
    stored = load_file(folder / "weights.safetensors")
    arrays = {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in stored.items()}
    check_arrays(arrays)

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    for whole, settings in (("backbone.", description["backbone"]["settings"]), ("head.", description["head"])):
        check_counted(settings, part(whole))
    tokenizer = TOKENIZERS[description["tokenizer"]["name"]](**description["tokenizer"]["settings"])
    with torch.random.fork_rng(devices=[]):  # new modules draw weights; the caller's random state stays
        kind, told = BACKBONES[description["backbone"]["name"]], description["backbone"]["settings"]
        backbone = made(
            lambda: kind(len(vocabulary), n_bins=tokenizer.n_bins, **told), part("backbone."), name="backbone"
        )
        head = made(lambda: GrowingHead(backbone.width, len(types), **description["head"]), part("head."), name="head")
    linear = LinearModel(**part("linear.")) if description["linear"] else None
    profiles = None
    if "profiles" in description:
        found, shares = part("profiles."), description["profiles"]
        profiles = ProfileModel(
            found["genes"], found["means"], found["depth"], found["known"],
            sharpness=float(shares["sharpness"]), share=float(shares["share"]),
        )  # fmt: skip
    rejector = REJECTORS[description["rejector"]](part("rejector.")) if description["rejector"] else None
    model = Annotator(
        vocabulary=vocabulary,
        types=types,
        tokenizer=tokenizer,
        backbone=backbone,
        head=head,
        linear=linear,
        temperature=float(description["temperature"]),
        rejector=rejector,
        bank=_read_bank(folder / "bank.h5ad", types),
        ledger=Ledger.from_text((folder / "ledger.jsonl").read_text(encoding="utf-8"), name=str(folder)),
        settings=description["settings"],
        sealed=_read_bank(folder / SEALED, types) if SEALED in description["sha256"] else None,
        strategy_state=part("strategy."),
        sketch=_read_sketch(folder, description, types),
        linear_share=float(description.get("linear_share", EVEN)),
        profiles=profiles,
        sets=LabelSets.of_arrays(part("sets.")) if description.get("sets") else None,
    )
    check_parts(model)
    return model


def _read_sketch(folder: Path, description: dict[str, Any], types: CellTypes) -> Sketch | None:
    from safetensors.numpy import load_file

    if SKETCH not in description["sha256"]:
        return None
    return Sketch.stored(load_file(folder / SKETCH), description["sketch"], types.names)


def _read_bank(path: Path, types: CellTypes) -> ExampleBank:
    import anndata as ad

    vet_hdf5(path)
    stored = sound(ad.read_h5ad(path))
    return ExampleBank(
        counts=stored.X.astype(np.float32).tocsr(),
        codes=types.codes(stored.obs["cell_type"].astype(str)),
        stages=stored.obs["stage"].to_numpy(),
        studies=stored.obs["study"].to_numpy(),
        measured=np.asarray(stored.varm["measured"]).T.astype(bool),
    )
