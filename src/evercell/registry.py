"""Models by name: those that come with evercell, and the user's own.

::

    own       $EVERCELL_MODELS, or evercell/models in the folder that the system keeps a user's data in
    packaged  models/ beside this file

Each model is a directory as `checkpoint.save` writes it; its name is the directory's. A name leads to the user's own
model first. Nothing here but `add`, `export` and `load` reads weights, so a list is quick.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from evercell.errors import ModelError, words_of
from evercell.locking import PATIENCE, locked
from evercell.outputs import atomic_path, check_model_output, is_model

if TYPE_CHECKING:
    import torch

    from evercell.annotator import Annotator

AUTO = "auto"
"""Word in place of a name that has the model chosen (see `choosing`); no model can have it for a name."""

PACKAGED = Path(__file__).parent / "models"
UNPACKED = ".unpacked"  # in the user's own folder, while a zip is taken in
SUMMARY = "Summary: "  # begins the line of a model card that lists show
Source = Literal["packaged", "own", "directory"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a leading dot would hide the folder, a leading dash be an option


@dataclass(frozen=True)
class ListedModel:
    """What is to be known of a model before it is loaded.

    Attributes
    ----------
    name
        What `find` and ``--model`` take.
    path
        Its directory.
    source
        ``"packaged"``, ``"own"``, or ``"directory"`` for one that is in neither folder.
    species
        Species of its genes; queries of the other are matched through orthologues.
    n_genes, n_types
        Number of genes and of cell types; a pretrained model has no types.
    types
        Names of the types.
    stages
        Number of stages in its ledger.
    n_bytes
        Size on disk.
    description
        What its card says after ``Summary:``; may be empty.
    format
        Version of the directory's layout.
    problem
        Why it cannot be used, as far as that is seen without loading it; empty otherwise.
    """

    name: str
    path: Path
    source: Source
    species: str = ""
    n_genes: int = 0
    n_types: int = 0
    types: tuple[str, ...] = ()
    stages: int = 0
    n_bytes: int = 0
    description: str = ""
    format: int = 0
    problem: str = ""


def own_folder() -> Path:
    """Folder of the user's own models; it may not be there yet."""
    if named := os.environ.get("EVERCELL_MODELS"):
        return Path(named).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "evercell" / "models"
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # What is not absolute is to be ignored, says the XDG base directory specification.
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "evercell" / "models"


def names(beginning: str = "") -> list[str]:
    """Names of models that begin so, without a look into them."""
    return sorted(name for name in {*_named(PACKAGED), *_named(own_folder())} if name.startswith(beginning))


def available() -> tuple[ListedModel, ...]:
    """Every model that a name leads to, by name; where both folders have a name, the user's own.

    Examples
    --------
    >>> from evercell import registry
    >>> all(one.path.is_dir() for one in registry.available())
    True
    """
    found = _named(PACKAGED) | _named(own_folder())
    return tuple(describe(path) for _, path in sorted(found.items()))


def with_types(models: Iterable[ListedModel] | None = None) -> tuple[ListedModel, ...]:
    """The models that can label cells, of all that are `available` or of `models`; and those that cannot be read.

    Raises
    ------
    ModelError
        If none can.
    """
    found = tuple(one for one in (available() if models is None else models) if one.n_types or one.problem)
    if not any(one.n_types for one in found):
        raise ModelError(
            "there is no model with cell types to choose from",
            hint="`evercell models add DIR` adds one of yours; `evercell train` makes one",
        )
    return found


def find(name: str | os.PathLike[str]) -> Path:
    """Directory of a model.

    Parameters
    ----------
    name
        A directory, or the name of a model. A directory of this name wins, unless it holds no model and a model has the
        name; then the user's own model, then the packaged one.

    Raises
    ------
    ModelError
        If there is neither; the message names those that are near.
    """
    path, word = Path(name), str(name)
    named = _named(PACKAGED) | _named(own_folder())
    if path.is_dir() and (is_model(path) or word not in named):
        return path
    if word in named:
        return named[word]
    message = f"there is no model `{word}`: `{path.absolute()}` is {'a file' if path.exists() else 'not there'}"
    hint = "give the directory that `evercell train --output` wrote"
    if word == AUTO:
        hint = "`auto` has the model chosen by the cells that are to be labelled; name a model here"
    elif _NAME.fullmatch(word) and not path.exists():
        message += ", and no model has this name"
        if near := _near(word, list(named)):
            message += f"; near it: {', '.join(f'`{one}`' for one in near)}"
        hint += ", or a name that `evercell models list` shows"
    raise ModelError(message, hint=hint)


def load(name: str | os.PathLike[str], *, device: torch.device | None = None) -> Annotator:
    """Load a model by its name or from its directory. Nothing in it is executed or unpickled.

    Parameters
    ----------
    name
        Name of a packaged model or of one of the user's own (see `available`), or a model directory.
    device
        Where its modules are put; the processor if not given. `annotate` and `embed` choose for themselves.

    Returns
    -------
    Annotator

    Raises
    ------
    ModelError
        If there is no such model, or it is damaged, or was written by a newer version.

    Examples
    --------
    >>> import evercell as ec
    >>> model = ec.load("human-immune")  # doctest: +SKIP
    >>> model = ec.load("results/model")  # doctest: +SKIP
    """
    from evercell import checkpoint

    return checkpoint.load(find(name), device=device)


def describe(path: str | os.PathLike[str]) -> ListedModel:
    """What the files of a model directory say of it; no weights are read, and no hashes are checked."""
    path = Path(path)
    place = Path(os.path.abspath(path))  # links stay: the name is that of the link
    folders: dict[Path, Source] = {PACKAGED: "packaged", Path(os.path.abspath(own_folder())): "own"}
    source: Source = folders.get(place.parent, "directory")
    try:
        stored = json.loads((path / "annotator.json").read_text(encoding="utf-8"))
        types = tuple(str(one) for one in stored["types"]["names"])
        with (path / "genes.txt").open(encoding="utf-8") as lines:
            species, n_genes = next(lines).rstrip("\n").split("\t")[2], sum(1 for _ in lines)
        with (path / "ledger.jsonl").open(encoding="utf-8") as lines:
            stages = sum(1 for _ in lines)
        return ListedModel(
            name=place.name,
            path=path,
            source=source,
            species=species,
            n_genes=n_genes,
            n_types=len(types),
            types=types,
            stages=stages,
            n_bytes=sum((path / file).stat().st_size for file in _files(path)),
            description=_summary(card(path)),
            format=int(stored["format"]),
        )
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RecursionError) as error:
        what = words_of(error)
        return ListedModel(place.name, path, source, problem=f"cannot be read: {what}")


def card(path: str | os.PathLike[str]) -> str:
    """Text of a model's card; empty where it has none."""
    file = Path(path) / "MODEL_CARD.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def add(directory: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False) -> ListedModel:
    """Copy a model into the folder of the user's own, so that it can be named.

    Parameters
    ----------
    directory
        Model directory, or a zip that `export` wrote. It is loaded first: what is damaged is not taken.
    name
        Its name from now on; that of the directory if not given.
    overwrite
        Replace an own model of this name, or stand before a packaged one.

    Raises
    ------
    ModelError
        If it is no model, or the name cannot be used or is taken.
    OutputError
        If it cannot be written there, or another process writes it.
    """
    from evercell import checkpoint

    given = Path(directory)
    if given.is_file() and given.suffix.lower() == ".zip":
        with _room(_made(own_folder()) / UNPACKED) as folder:
            try:
                return add(_unpacked(given, folder), name, overwrite=overwrite)
            except ModelError as error:  # of a folder that the user has never seen
                raise ModelError(error.message.replace(str(folder), str(given)), hint=error.hint) from error
    source = find(directory)
    if name is None:
        name = Path(os.path.abspath(source)).name
    if not _NAME.fullmatch(name) or name == AUTO:
        raise ModelError(
            f"`{name}` cannot be the name of a model"
            + (": it stands for the model that fits the cells" if name == AUTO else ""),
            hint="name it with --name: letters, digits, `_`, and, but not first, `-` and `.`",
        )
    target = own_folder() / name
    if not overwrite and is_model(target):
        raise ModelError(
            f"you have a model `{name}` already, in `{target}`",
            hint="choose another --name, or pass --overwrite to replace it",
        )
    if not overwrite and name in _named(PACKAGED):
        raise ModelError(
            f"`{name}` is the name of a model that comes with evercell, which yours would hide",
            hint="choose another --name, or pass --overwrite: the name then leads to yours, and the other stays",
        )
    check_model_output(target, overwrite=overwrite, mend="choose another --name")
    checkpoint.load(source)
    _made(own_folder())
    with locked(target, patience=PATIENCE):
        check_model_output(target, overwrite=overwrite, mend="choose another --name")
        with atomic_path(target) as unfinished:
            _copy(source, _files(source), unfinished)
    return describe(target)


def export(name: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a copy of a model that can be passed on.

    Parameters
    ----------
    name
        Name or directory of the model. It is loaded first: what is damaged is not passed on.
    output
        A directory to be made, or a file that ends in ``.zip``: then a zip with the one folder NAME. The same model
        gives the same bytes. Links and hidden files are left out.
    overwrite
        Replace a model or a zip that is there.

    Raises
    ------
    ModelError
        If there is no such model, or something is at `output`.
    """
    from evercell import checkpoint

    source, output = find(name), Path(output)
    zipped = output.suffix.lower() == ".zip"
    if zipped and output.exists() and not (overwrite and output.is_file()):
        raise ModelError(f"`{output}` is already there", hint="choose another --output, or pass --overwrite")
    if not zipped:
        check_model_output(output, overwrite=overwrite)
    checkpoint.load(source)
    files = _files(source)
    with atomic_path(output) as unfinished:
        if zipped:
            _zip(source, files, unfinished)
        else:
            _copy(source, files, unfinished)
    return output


def _named(folder: Path) -> dict[str, Path]:
    """The models of one of the two folders: name -> directory."""
    if not folder.is_dir():
        return {}
    return {one.name: one for one in folder.iterdir() if _NAME.fullmatch(one.name) and is_model(one)}


def _near(word: str, names: Sequence[str]) -> list[str]:
    """Names that were perhaps meant: those that hold the word, and those that are spelt like it."""
    folded = {name.casefold(): name for name in names}
    holding = [one for one in folded if len(word) > 2 and word.casefold() in one]
    alike = difflib.get_close_matches(word.casefold(), folded, n=3, cutoff=0.6)
    return [folded[one] for one in dict.fromkeys([*alike, *sorted(holding)])][:3]


def _summary(text: str) -> str:
    """The first line that begins with `SUMMARY`, without that word."""
    found = (line.removeprefix(SUMMARY).strip() for line in text.splitlines() if line.startswith(SUMMARY))
    return next(found, "")


def _files(directory: Path) -> list[Path]:
    """Files of a model, relative to its directory: no links, which lead to what is not its own, and nothing hidden."""
    found = (one.relative_to(directory) for one in directory.rglob("*") if one.is_file() and not one.is_symlink())
    return sorted(one for one in found if not any(part.startswith(".") for part in one.parts))


def _copy(source: Path, files: Sequence[Path], target: Path) -> None:
    target.mkdir()
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def _zip(source: Path, files: Sequence[Path], target: Path) -> None:
    top = Path(os.path.abspath(source)).name
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            entry = zipfile.ZipInfo(f"{top}/{file.as_posix()}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
            entry.file_size = (source / file).stat().st_size  # tells it to write large files as such
            with (source / file).open("rb") as content, archive.open(entry, "w") as written:
                shutil.copyfileobj(content, written)


@contextmanager
def _room(folder: Path) -> Iterator[Path]:
    """An empty folder for one process at a time; what a killed one left in it goes."""
    with locked(folder, patience=PATIENCE):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _unpacked(file: Path, folder: Path) -> Path:
    """The model of a zip, unpacked into an empty folder.

    A zip may come from anywhere: it is refused whole where it holds a link, or a name that leads out of its one folder.
    """
    hint = "give a zip that `evercell models export` wrote"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [one for one in archive.infolist() if not one.is_dir()]
            for one in entries:
                parts = PurePosixPath(one.filename).parts
                plain = not re.search(r"[\\:\0]|^/", one.filename) and ".." not in parts and len(parts) > 1
                if not plain or stat.S_ISLNK(one.external_attr >> 16) or parts[0] != entries[0].filename.split("/")[0]:
                    raise ModelError(
                        f"`{file}` is no zip of a model: it holds `{one.filename}`, "
                        "and plain files in one folder were expected",
                        hint=hint,
                    )
            if not entries:
                raise ModelError(f"`{file}` is no zip of a model: it is empty", hint=hint)
            # No more than this is unpacked of an entry, whatever is in it.
            if sum(one.file_size for one in entries) > shutil.disk_usage(folder).free:
                raise ModelError(f"there is no room for what `{file}` holds", hint="make room, or set EVERCELL_MODELS")
            for one in entries:
                target = folder / one.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(one) as content, target.open("xb") as written:
                    shutil.copyfileobj(content, written)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, FileExistsError) as error:
        raise ModelError(f"`{file}` cannot be unpacked: {error}", hint=f"copy it again, or {hint}") from error
    return folder / entries[0].filename.split("/")[0]


def _made(folder: Path) -> Path:
    """A folder, made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the folder `{folder}` of your own models cannot be made: {error.strerror}",
            hint="set EVERCELL_MODELS to a folder that you may write in",
        ) from error
    return folder
