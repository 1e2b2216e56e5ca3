"""Bad models, each made from a good one with one thing wrong and its hashes made right again, as an attacker would.

Each maker gets the good model and the folder to write in, and returns the path of the bad one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from evercell import checkpoint

from .cell_files import declared, packed_zeros, put

Maker = Callable[[Path, Path], Path]
MODEL_FILES: dict[str, Maker] = {}
Description = dict[str, Any]
FORGED = "f" * 64
"""Fingerprint of all of them: the tests have every model say that this is its own, as one could that was made so."""


def forged(model: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy that was changed, with the hashes of its files and of its description made again."""
    target = Path(shutil.copytree(model, folder / "model"))
    own = target / "annotator.json"
    before = json.loads(own.read_text())["fingerprint"]
    change(target)
    description = json.loads(own.read_text())
    for name in list(description["sha256"]):
        if name != "annotator.json" and (target / name).is_file():
            description["sha256"][name] = hashlib.sha256((target / name).read_bytes()).hexdigest()
    if description.get("fingerprint") == before:
        description["fingerprint"] = FORGED
    description["sha256"]["annotator.json"] = checkpoint._own_digest(description)
    own.write_text(json.dumps(description))
    return target


def of_description(name: str, change: Callable[[Description], object]) -> None:
    def edit(target: Path) -> None:
        own = target / "annotator.json"
        description = json.loads(own.read_text())
        change(description)
        own.write_text(json.dumps(description))

    MODEL_FILES[name] = lambda model, folder: forged(model, folder, edit)


def of_file(name: str, file: str, change: Callable[[Path], object], *, honest: bool = False) -> None:
    """`honest`: the hashes are left as they were."""

    def maker(model: Path, folder: Path) -> Path:
        if honest:
            target = Path(shutil.copytree(model, folder / "model"))
            change(target / file)
            return target
        return forged(model, folder, lambda target: change(target / file))

    MODEL_FILES[name] = maker


def of_h5(name: str, change: Callable[[h5py.File], object], file: str = "bank.h5ad") -> None:
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as stored:
            change(stored)

    of_file(name, file, edit)


# --- annotator.json

for _name, _text in {
    "description_empty": "",
    "description_of_text": "hello",
    "description_a_list": "[]",
    "description_a_number": "3",
    "description_deep": "[" * 200_000,
    "description_a_huge_number": '{"format": ' + "9" * 5000 + "}",
    "description_format_of_text": '{"format": "one"}',
    "description_format_infinite": '{"format": 1e999}',
    "description_twice": '{"format": 1, "format": 99, "sha256": {}}',
    "description_a_long_string": '{"format": 1, "sha256": "' + "a" * (1 << 22) + '"}',
}.items():
    of_file(_name, "annotator.json", lambda path, text=_text: path.write_text(text), honest=True)

of_description("format_newer", lambda d: d.update(format=99))
of_description("format_negative", lambda d: d.update(format=-1))
of_description("format_true", lambda d: d.update(format=True))
of_description("types_fewer", lambda d: d["types"]["names"].pop())
of_description("types_twice", lambda d: d["types"].update(names=["alpha"] * 4))
of_description("types_of_numbers", lambda d: d["types"].update(names=[1, 2, 3, 4]))
of_description("types_a_text", lambda d: d["types"].update(names="abcd"))
of_description("types_missing", lambda d: d.pop("types"))
of_description("types_stages_of_text", lambda d: d["types"].update(stages=["first"] * 4))
of_description("tokenizer_unknown", lambda d: d["tokenizer"].update(name="os.system"))
of_description("tokenizer_setting_unknown", lambda d: d["tokenizer"].update(settings={"shell": "rm"}))
of_description("backbone_unknown", lambda d: d["backbone"].update(name="evercell.cli:main"))
of_description("backbone_huge", lambda d: d["backbone"]["settings"].update(member_width=10**7))
of_description("backbone_very_deep", lambda d: d["backbone"]["settings"].update(depth=10**6))
of_description("backbone_of_text", lambda d: d["backbone"]["settings"].update(depth="deep"))
of_description("backbone_negative", lambda d: d["backbone"]["settings"].update(depth=-3))
of_description("backbone_a_list", lambda d: d.update(backbone=[]))
of_description("head_huge", lambda d: d["head"].update(hidden=[10**9]))
of_description("head_many", lambda d: d["head"].update(hidden=[64] * 100_000))
of_description("rejector_unknown", lambda d: d.update(rejector="magic"))
of_description("temperature_of_text", lambda d: d.update(temperature="hot"))
of_description("temperature_zero", lambda d: d.update(temperature=0))
of_description("temperature_nan", lambda d: d.update(temperature=float("nan")))
of_description("temperature_missing", lambda d: d.pop("temperature"))
of_description("profiles_share_of_text", lambda d: d["profiles"].update(share="half"))
of_description("fingerprint_other", lambda d: d.update(fingerprint="0" * 64))
of_description("fingerprint_missing", lambda d: d.pop("fingerprint"))
of_description("ledger_head_other", lambda d: d.update(ledger_head="0" * 64))
of_description("ledger_head_missing", lambda d: d.pop("ledger_head"))
of_description("settings_missing", lambda d: d.pop("settings"))

# --- genes.txt, ledger.jsonl


def lines(change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        found = path.read_text().split("\n")
        change(found)
        path.write_text("\n".join(found))

    return edit


of_file("genes_empty", "genes.txt", lambda path: path.write_text(""))
of_file("genes_without_head", "genes.txt", lines(lambda found: found.pop(0)))
of_file(
    "genes_version_newer", "genes.txt", lines(lambda found: found.__setitem__(0, "# evercell genes\tversion 9\thuman"))
)
of_file("genes_of_one_column", "genes.txt", lines(lambda found: found.__setitem__(3, "INS")))
of_file("genes_twice", "genes.txt", lines(lambda found: found.__setitem__(3, found[2])))
of_file("genes_fewer", "genes.txt", lines(lambda found: found.pop(5)))
of_file("genes_more", "genes.txt", lines(lambda found: found.insert(5, "NEW1\tNEW1")))
of_file("genes_binary", "genes.txt", lambda path: path.write_bytes(bytes(range(256))))
of_file("ledger_empty", "ledger.jsonl", lambda path: path.write_text(""))
of_file("ledger_of_text", "ledger.jsonl", lambda path: path.write_text("nothing\n"))
of_file("ledger_edited", "ledger.jsonl", lambda path: path.write_text(path.read_text().replace("alpha", "omega")))
of_file("ledger_line_twice", "ledger.jsonl", lambda path: path.write_text(path.read_text() * 2))
of_file("ledger_deep", "ledger.jsonl", lambda path: path.write_text("[" * 200_000 + "\n"))
of_file("ledger_edited_honestly", "ledger.jsonl", lambda path: path.write_text("{}\n"), honest=True)

# --- weights.safetensors


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Edit the JSON that tells of the arrays, not the arrays."""

    def edit(path: Path) -> None:
        whole = path.read_bytes()
        (size,) = struct.unpack("<Q", whole[:8])
        told = json.loads(whole[8 : 8 + size])
        change(told)
        text = json.dumps(told).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])

    return edit


def arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    from safetensors.numpy import load_file, save

    def edit(path: Path) -> None:
        found = load_file(path)
        change(found)
        path.write_bytes(save(found))

    return edit


def spoilt(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(found: dict[str, np.ndarray]) -> None:
        key = next(one for one in found if one.startswith(name) and found[one].dtype.kind == "f")
        found[key] = found[key].astype(np.float32)
        found[key].flat[0] = value

    return change


WEIGHTS = "weights.safetensors"
of_file("weights_empty", WEIGHTS, lambda path: path.write_bytes(b""))
of_file("weights_by_pickle", WEIGHTS, lambda path: path.write_bytes(b"\x80\x04\x95" + b"\0" * 50))
of_file("weights_header_of_a_terabyte", WEIGHTS, lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"))
of_file("weights_header_deep", WEIGHTS, lambda path: path.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5))
of_file("weights_shape_lies", WEIGHTS, header(lambda told: next(iter(told.values())).update(shape=[1 << 40])))
of_file(
    "weights_offsets_lie", WEIGHTS, header(lambda told: next(iter(told.values())).update(data_offsets=[0, 1 << 50]))
)
of_file("weights_type_unknown", WEIGHTS, header(lambda told: next(iter(told.values())).update(dtype="PICKLE")))
of_file("weights_missing_one", WEIGHTS, arrays(lambda found: found.pop(next(one for one in found if "head." in one))))
of_file("weights_one_too_many", WEIGHTS, arrays(lambda found: found.update({"backbone.extra": np.zeros(3, "f4")})))
of_file("weights_other_shape", WEIGHTS, arrays(
    lambda found: found.update({one: a[:, :-1].copy() for one, a in found.items() if one == "linear.weight"})
))  # fmt: skip
of_file("profiles_gene_out_of_range", WEIGHTS, arrays(
    lambda found: found.update({"profiles.genes": found["profiles.genes"] + 10**6})
))  # fmt: skip
for _part in ("backbone.", "head.", "linear.", "profiles.", "rejector."):
    of_file(f"nan_in_{_part[:-1]}", WEIGHTS, arrays(spoilt(_part, np.nan)))
of_file("infinite_in_linear", WEIGHTS, arrays(spoilt("linear.", np.inf)))

# --- bank.h5ad, sealed.h5ad


def edited(array: str, place: int, value: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file["X"][array][:].astype(np.int64)
        values[place] = value
        put(file["X"], array, values)

    return change


def bank_bomb(file: h5py.File) -> None:
    packed_zeros(file["uns"], "note", 400)


def bank_outside(file: h5py.File) -> None:
    file["uns"].create_dataset("note", (8,), dtype="u1", external=[("/etc/hostname", 0, 8)])


of_h5("bank_index_out_of_range", edited("indices", 4, 10**6))
of_h5("bank_index_negative", edited("indices", 4, -7))
of_h5("bank_indptr_goes_down", edited("indptr", 4, 10**6))
of_h5("bank_declares_too_much", lambda file: declared(file["X"], "data", (10**12,)))
of_h5("bank_bomb", bank_bomb)
of_h5("bank_values_outside", bank_outside)
of_h5("bank_nan", lambda file: put(file["X"], "data", np.full(file["X/data"].shape, np.nan, dtype="f4")))
of_h5("bank_negative", lambda file: put(file["X"], "data", -file["X/data"][:].astype("f4")))
of_h5("bank_without_types", lambda file: file["obs"].pop("cell_type"))
of_h5(
    "bank_stage_of_text", lambda file: put(file["obs"], "stage", np.array(["a"] * len(file["obs/stage"]), dtype="S1"))
)
of_h5("bank_study_out_of_range", lambda file: put(file["obs"], "study", file["obs/study"][:] + 99))
of_h5("bank_without_measured", lambda file: file["varm"].pop("measured"))
of_h5("sealed_index_out_of_range", edited("indices", 4, 10**6), "sealed.h5ad")
of_file("bank_of_text", "bank.h5ad", lambda path: path.write_text("cells"))
of_file("bank_cut_off", "bank.h5ad", lambda path: path.write_bytes(path.read_bytes()[:5000]))
of_file("bank_missing", "bank.h5ad", lambda path: path.unlink())
of_file("bank_changed", "bank.h5ad", lambda path: path.write_bytes(path.read_bytes() + b"\0"), honest=True)


def linked(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


of_file("genes_a_link", "genes.txt", linked, honest=True)
of_file("description_a_link", "annotator.json", linked, honest=True)
of_file("weights_a_pipe", WEIGHTS, piped, honest=True)

# --- zips of models


def of_zip(name: str, write: Callable[[zipfile.ZipFile, Path], object]) -> None:
    def maker(model: Path, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            write(archive, model)
        return folder / "model.zip"

    MODEL_FILES[name] = maker


def whole(archive: zipfile.ZipFile, model: Path) -> None:
    for file in sorted(model.iterdir()):
        archive.write(file, f"model/{file.name}")


def with_entry(entry: str | zipfile.ZipInfo, content: bytes = b"x") -> Callable[[zipfile.ZipFile, Path], None]:
    def write(archive: zipfile.ZipFile, model: Path) -> None:
        whole(archive, model)
        archive.writestr(entry, content)

    return write


def link_entry() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("model/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def many(archive: zipfile.ZipFile, model: Path) -> None:
    whole(archive, model)
    for number in range(3000):
        archive.writestr(f"model/{number}", b"")


of_zip("zip_empty", lambda archive, model: None)
of_zip("zip_slip", with_entry("../../evil.txt"))
of_zip("zip_slip_inside", with_entry("model/../../evil.txt"))
of_zip("zip_absolute", with_entry("/evil.txt"))
of_zip("zip_backslash", with_entry("model\\..\\evil.txt"))
of_zip("zip_drive", with_entry("C:/evil.txt"))
of_zip("zip_link", with_entry(link_entry(), b"/etc/passwd"))
of_zip("zip_two_folders", with_entry("other/annotator.json"))
of_zip("zip_twice_the_same", with_entry("model/genes.txt"))
of_zip("zip_of_files", lambda archive, model: archive.write(model / "genes.txt", "genes.txt"))
of_zip("zip_of_no_model", lambda archive, model: archive.writestr("model/readme.txt", "hello"))
of_zip("zip_many_entries", many)
of_zip("zip_bomb", with_entry("model/zeros", bytes(600 << 20)))


@(lambda maker: MODEL_FILES.setdefault("zip_of_text", maker))
def zip_of_text(model: Path, folder: Path) -> Path:
    (folder / "model.zip").write_text("no zip")
    return folder / "model.zip"


@(lambda maker: MODEL_FILES.setdefault("zip_cut_off", maker))
def zip_cut_off(model: Path, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        whole(archive, model)
    path = folder / "model.zip"
    path.write_bytes(path.read_bytes()[:9000])
    return path


@(lambda maker: MODEL_FILES.setdefault("zip_sizes_lie", maker))
def zip_sizes_lie(model: Path, folder: Path) -> Path:
    """Entries that say they are smaller than they are."""
    path = folder / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        whole(archive, model)
        archive.writestr("model/zeros", bytes(1 << 20))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 10)))
    assert zlib.crc32(b"") == 0
    return path
