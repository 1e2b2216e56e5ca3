"""Names of models: what they lead to, how a model gets one, and how it is passed on."""

from __future__ import annotations

import inspect
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import evercell as ec
from evercell import checkpoint, registry
from evercell.errors import ModelError, OutputError

CARD = "# Model card\n\nSummary: four made-up types of the pancreas\nSummary: not this one\n"


@pytest.fixture(scope="module")
def saved(model: ec.Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(model, tmp_path_factory.mktemp("saved") / "model", card=CARD)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of packaged and of own models, empty, and a folder to be in, without either."""
    packaged, own, here = tmp_path / "packaged", tmp_path / "own" / "models", tmp_path / "here"
    monkeypatch.setattr(registry, "PACKAGED", packaged)
    monkeypatch.setenv("EVERCELL_MODELS", str(own))
    here.mkdir()
    monkeypatch.chdir(here)
    return packaged, own


def names() -> list[tuple[str, str]]:
    return [(one.name, one.source) for one in registry.available()]


# --- where models are


def test_folder_of_own_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert registry.own_folder() == tmp_path / "own" / "models"
    monkeypatch.setenv("EVERCELL_MODELS", "")  # empty is not set
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert registry.own_folder() == tmp_path / "data" / "evercell" / "models"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for unused in ("", "relative/data"):
        monkeypatch.setenv("XDG_DATA_HOME", unused)
        assert registry.own_folder() == tmp_path / "home" / ".local" / "share" / "evercell" / "models"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert registry.own_folder() == tmp_path / "local" / "evercell" / "models"


def test_packaged_models_are_looked_for_beside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Path(ec.__file__).resolve().parent / "models" == registry.PACKAGED


def test_without_folders_there_are_no_models() -> None:
    assert registry.available() == ()
    with pytest.raises(ModelError, match="no model with cell types to choose from") as caught:
        registry.with_types()
    assert "evercell models add" in str(caught.value.hint)


def test_listed_models_by_name_own_before_packaged(saved: Path, folders: tuple[Path, Path]) -> None:
    packaged, own = folders
    for path in (packaged / "lung", packaged / "immune", own / "mine", own / "lung"):
        shutil.copytree(saved, path)
    for path in (own / ".hidden", own / "two words", packaged / "-x"):  # cannot be named
        shutil.copytree(saved, path)
    (packaged / "no-model").mkdir()
    (packaged / "README.md").write_text("models")
    assert names() == [("immune", "packaged"), ("lung", "own"), ("mine", "own")]
    assert registry.find("lung") == own / "lung"
    assert registry.find("immune") == packaged / "immune"


def test_what_is_listed_is_what_is_loaded(saved: Path, model: ec.Annotator) -> None:
    found = registry.describe(saved)
    loaded = checkpoint.load(saved)
    assert (found.name, found.path, found.source, found.problem) == ("model", saved, "directory", "")
    assert (found.n_genes, found.species) == (len(loaded.vocabulary), loaded.vocabulary.species)
    assert found.types == loaded.types.names
    assert (found.n_types, found.stages, found.format) == (4, 1, checkpoint.FORMAT_WITH_SETS)
    assert found.n_bytes == sum(one.stat().st_size for one in saved.iterdir())
    assert found.description == "four made-up types of the pancreas"


def test_a_model_without_a_card_has_no_description(saved: Path, folders: tuple[Path, Path]) -> None:
    shutil.copytree(saved, folders[1] / "mine")
    (folders[1] / "mine" / "MODEL_CARD.md").unlink()
    (found,) = registry.available()
    assert (found.description, found.problem) == ("", "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("annotator.json", "{"),
        ("annotator.json", "[]"),
        ("annotator.json", '{"types": {"names": 3}, "format": 1}'),
        ("genes.txt", ""),
        ("genes.txt", "\n"),
        ("ledger.jsonl", None),
    ],
)
def test_one_damaged_model_does_not_hide_the_others(
    saved: Path, folders: tuple[Path, Path], file: str, content: str | None
) -> None:
    for name in ("bad", "good"):
        shutil.copytree(saved, folders[1] / name)
    if content is None:
        (folders[1] / "bad" / file).unlink()
    else:
        (folders[1] / "bad" / file).write_text(content)
    bad, good = registry.available()
    assert bad.problem.startswith("cannot be read: ")
    assert (good.problem, good.n_types) == ("", 4)
    with pytest.raises(ModelError, match="bad"):
        registry.load("bad")


def test_a_list_imports_nothing_heavy(saved: Path, folders: tuple[Path, Path]) -> None:
    shutil.copytree(saved, folders[1] / "mine")
    code = (
        "import sys\nfrom evercell.cli import main\nassert main(['models', 'list']) == 0\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'pandas', 'anndata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mine" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


# --- finding and loading


def test_a_directory_of_the_name_wins(saved: Path, folders: tuple[Path, Path]) -> None:
    shutil.copytree(saved, folders[1] / "lung")
    Path("lung").mkdir()
    assert registry.find("lung") == folders[1] / "lung"  # a folder of data is no model
    shutil.copytree(saved, "lung", dirs_exist_ok=True)
    assert registry.find("lung") == Path("lung")
    assert registry.find(saved) == saved
    Path("empty").mkdir()
    assert registry.find("empty") == Path("empty")  # `load` says what is missing there


def test_the_message_names_what_is_near(saved: Path, folders: tuple[Path, Path]) -> None:
    for name in ("human-lung", "mouse-lung", "human-pancreas"):
        shutil.copytree(saved, folders[0] / name)
    place = Path.cwd()
    for word, near in (
        ("human-lnug", "`human-lung`"),
        ("lung", "`human-lung`, `mouse-lung`"),
        ("Human-Pancreas", "`human-pancreas`"),
    ):
        with pytest.raises(ModelError) as caught:
            registry.find(word)
        assert caught.value.message.startswith(
            f"there is no model `{word}`: `{place / word}` is not there, and no model"
        )
        assert near in caught.value.message
        assert "`evercell models list`" in str(caught.value.hint)
    with pytest.raises(ModelError) as caught:
        registry.find("zebrafish")
    assert "near it" not in caught.value.message


def test_paths_and_files_are_not_taken_for_names(saved: Path, folders: tuple[Path, Path]) -> None:
    shutil.copytree(saved, folders[1] / "mine")
    for word in ("../mine", "a/mine", str(folders[1] / "none")):
        with pytest.raises(ModelError, match="is not there") as caught:
            registry.find(word)
        assert "models list" not in str(caught.value.hint)
    Path("cells.h5ad").write_text("")
    with pytest.raises(ModelError, match=r"`.*cells.h5ad` is a file"):
        registry.find("cells.h5ad")
    with pytest.raises(ModelError) as caught:
        registry.find("auto")
    assert "name a model here" in str(caught.value.hint)


def test_python_loads_by_name_and_from_a_directory(
    saved: Path, folders: tuple[Path, Path], model: ec.Annotator
) -> None:
    shutil.copytree(saved, folders[0] / "pancreas")
    assert ec.load is registry.load
    for name in ("pancreas", saved, str(saved)):
        assert ec.load(name).fingerprint == model.fingerprint
    ours, theirs = inspect.signature(ec.load), inspect.signature(checkpoint.load)
    assert [p.annotation for p in ours.parameters.values()] == [p.annotation for p in theirs.parameters.values()]
    assert ours.return_annotation == theirs.return_annotation


# --- adding


def test_an_added_model_has_its_name(saved: Path, folders: tuple[Path, Path], model: ec.Annotator) -> None:
    source = Path("source")
    shutil.copytree(saved, source)
    (source / "stages" / "1").mkdir(parents=True)
    (source / "stages" / "1" / "genes.txt").write_text("kept")
    (source / ".DS_Store").write_text("hidden")
    (source / "LICENSE").write_text("MIT")
    (source / "link").symlink_to(saved)
    (source / "passwd").symlink_to("/etc/passwd")
    found = registry.add(source)
    assert (found.name, found.path, found.source) == ("source", folders[1] / "source", "own")
    assert registry.load("source").fingerprint == model.fingerprint
    copied = {str(one.relative_to(found.path)) for one in found.path.rglob("*") if one.is_file()}
    assert copied == {*(one.name for one in saved.iterdir()), "LICENSE", "stages/1/genes.txt"}
    assert [one.name for one in folders[1].iterdir()] == ["source"]
    assert registry.add(source, "mine").name == "mine"
    assert names() == [("mine", "own"), ("source", "own")]


def test_taken_names_are_refused_unless_asked_for(saved: Path, folders: tuple[Path, Path]) -> None:
    registry.add(saved, "mine")
    (folders[1] / "mine" / "old").write_text("")
    with pytest.raises(ModelError, match="you have a model `mine` already") as caught:
        registry.add(saved, "mine")
    assert "--overwrite" in str(caught.value.hint)
    registry.add(saved, "mine", overwrite=True)
    assert not (folders[1] / "mine" / "old").exists()
    registry.add("mine", "mine", overwrite=True)  # onto itself
    assert names() == [("mine", "own")]


def test_a_packaged_name_is_hidden_only_where_that_is_asked_for(saved: Path, folders: tuple[Path, Path]) -> None:
    shutil.copytree(saved, folders[0] / "lung")
    with pytest.raises(ModelError, match="comes with evercell, which yours would hide"):
        registry.add(saved, "lung")
    assert names() == [("lung", "packaged")]
    registry.add(saved, "lung", overwrite=True)
    assert names() == [("lung", "own")]
    assert (folders[0] / "lung").is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a\\b", "a b", "auto", "ä", "a\n"])
def test_names_that_cannot_be(saved: Path, folders: tuple[Path, Path], name: str) -> None:
    with pytest.raises(ModelError, match="cannot be the name of a model"):
        registry.add(saved, name)
    assert not folders[1].exists()


def test_what_is_no_model_is_not_added(saved: Path, folders: tuple[Path, Path]) -> None:
    Path("folder").mkdir()
    with pytest.raises(ModelError, match=r"no annotator\.json"):
        registry.add("folder")
    shutil.copytree(saved, "damaged")
    Path("damaged", "genes.txt").write_text("# evercell genes\tversion 1\thuman\n")
    with pytest.raises(ModelError, match=r"`genes\.txt` was changed or cut off"):
        registry.add("damaged")
    with pytest.raises(ModelError, match="is not there"):
        registry.add("none")
    assert not folders[1].exists()
    (folders[1] / "mine").mkdir(parents=True)
    (folders[1] / "mine" / "data.csv").write_text("")
    with pytest.raises(ModelError, match="is already there, and is no model"):
        registry.add(saved, "mine", overwrite=True)


def test_a_copy_that_fails_leaves_what_was_there(
    saved: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, model: ec.Annotator
) -> None:
    """Invariant 9: a killed command leaves the old model or the new one, never half of one."""
    registry.add(saved, "mine")
    copy = shutil.copyfile

    def failing(source: Path, target: Path) -> None:
        if source.name == "weights.safetensors":
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    for name in ("mine", "other"):
        with pytest.raises(OutputError, match="No space"):
            registry.add(saved, name, overwrite=True)
    assert [one.name for one in folders[1].iterdir()] == ["mine"]
    assert registry.load("mine").fingerprint == model.fingerprint


def test_a_folder_that_cannot_be_made(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("EVERCELL_MODELS", str(Path("file", "models").absolute()))
    with pytest.raises(ModelError, match="of your own models cannot be made") as caught:
        registry.add(saved)
    assert "EVERCELL_MODELS" in str(caught.value.hint)


# --- passing on


def test_exported_as_a_directory(saved: Path, folders: tuple[Path, Path], model: ec.Annotator) -> None:
    registry.add(saved, "mine")
    assert registry.export("mine", "copy") == Path("copy")
    assert ec.load("copy").fingerprint == model.fingerprint
    with pytest.raises(ModelError, match="`copy` is already there") as caught:
        registry.export("mine", "copy")
    assert "--overwrite" in str(caught.value.hint)
    registry.export("mine", "copy", overwrite=True)
    Path("data").mkdir()
    Path("data", "x").write_text("")
    with pytest.raises(ModelError, match="`data` is already there, and is no model"):
        registry.export("mine", "data", overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        registry.export("mine", "no/copy")


def test_exported_as_a_zip_with_one_folder(saved: Path, folders: tuple[Path, Path], model: ec.Annotator) -> None:
    registry.add(saved, "mine")
    registry.export("mine", "one.zip")
    registry.export(folders[1] / "mine", "two.zip")
    assert Path("one.zip").read_bytes() == Path("two.zip").read_bytes()
    with zipfile.ZipFile("one.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"mine"}
        archive.extractall("unzipped")
    assert ec.load("unzipped/mine").fingerprint == model.fingerprint
    with pytest.raises(ModelError, match="already there"):
        registry.export("mine", "one.zip")
    registry.export("mine", "one.zip", overwrite=True)
    shutil.rmtree(folders[1])
    assert registry.add("one.zip").name == "mine"
    assert registry.add("one.zip", "other").name == "other"
    assert sorted(one.name for one in folders[1].iterdir()) == ["mine", "other"]
    assert ec.load("other").fingerprint == model.fingerprint


def test_a_damaged_model_is_not_passed_on(saved: Path) -> None:
    shutil.copytree(saved, "damaged")
    content = bytearray(Path("damaged", "weights.safetensors").read_bytes())
    content[-1] ^= 1
    Path("damaged", "weights.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"`weights\.safetensors` was changed"):
        registry.export("damaged", "x.zip")
    assert not Path("x.zip").exists()


@pytest.mark.parametrize(
    "entries",
    [
        ["../evil"],
        ["mine/../../evil"],
        ["/evil"],
        ["mine\\..\\evil/x"],
        ["C:/evil"],
        ["evil"],
        ["mine/x", "evil/x"],
        ["mine/link"],
        [],
    ],
    ids=repr,
)
def test_a_zip_that_leads_elsewhere_is_refused_whole(
    folders: tuple[Path, Path], tmp_path: Path, entries: list[str]
) -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK if name.endswith("link") else stat.S_IFREG) << 16
            archive.writestr(entry, "/etc/passwd")
    before = {str(one) for one in tmp_path.rglob("*")}
    with pytest.raises(ModelError, match=r"`x\.zip` is no zip of a model"):
        registry.add("x.zip")
    own = {str(folders[1]), str(folders[1].parent)}
    assert {str(one) for one in tmp_path.rglob("*")} - own == before


def test_a_zip_that_cannot_be_unpacked(
    saved: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text.zip").write_text("no zip")
    with pytest.raises(ModelError, match=r"`text.zip` cannot be unpacked"):
        registry.add("text.zip")
    registry.export(saved, "whole.zip")
    content = bytearray(Path("whole.zip").read_bytes())
    content[len(content) // 2] ^= 255
    Path("broken.zip").write_bytes(content)
    with pytest.raises(ModelError, match=r"`broken\.zip` cannot be unpacked"):
        registry.add("broken.zip")
    # A model that was changed before it was zipped: the message names the zip, not the folder it was unpacked into.
    with zipfile.ZipFile("whole.zip") as archive, zipfile.ZipFile("changed.zip", "w") as changed:
        for name in archive.namelist():
            text = archive.read(name)
            changed.writestr(name, text + b"\n" if name.endswith("ledger.jsonl") else text)
    with pytest.raises(ModelError, match=r"the model `changed.zip/model` is damaged: `ledger.jsonl`"):
        registry.add("changed.zip")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("data/readme", "no model")
    with pytest.raises(ModelError, match=r"`other.zip/data` is no model"):
        registry.add("other.zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ModelError, match="no room"):
        registry.add("whole.zip")
    assert list(folders[1].iterdir()) == []
