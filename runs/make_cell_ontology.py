"""Write the packaged Cell Ontology table from the data of the package cellxgene-ontology-guide.

The ontology is the Cell Ontology (CL) of the OBO Foundry, licence CC BY 4.0. One line a term that is not deprecated:
id, label, synonyms (joined by `|`), ids of its direct parents (is_a, joined by `|`). Each run writes the same bytes.

    pip install cellxgene-ontology-guide
    python runs/make_cell_ontology.py
"""

from __future__ import annotations

import argparse
import gzip
import importlib.resources
import io
import json
from pathlib import Path

import zstandard

DEFAULT = Path(__file__).resolve().parents[1] / "src" / "evercell" / "data" / "cell_ontology.tsv.gz"


def newest_release() -> tuple[str, dict[str, dict]]:
    """Release name and terms of the newest Cell Ontology that the installed package holds."""
    folder = importlib.resources.files("cellxgene_ontology_guide.data")
    file = max((f for f in folder.iterdir() if f.name.startswith("CL-ontology-")), key=lambda f: f.name)
    release = file.name.removeprefix("CL-ontology-").removesuffix(".json.zst")
    return release, json.loads(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(file.read_bytes())).read())


def one_line(text: str) -> str:
    """Text without the characters that part fields and lines."""
    return " ".join(text.replace("|", "/").split())


def write_table(path: Path) -> None:
    """Write the table to `path` and print what is in it."""
    release, entries = newest_release()
    kept = {cl: entry for cl, entry in sorted(entries.items()) if cl.startswith("CL:") and not entry["deprecated"]}
    lines = [f"# Cell Ontology {release}, obophenotype.github.io/cell-ontology, CC BY 4.0"]
    for cl, entry in kept.items():
        # a distance of one in the package's table of ancestors is a direct is_a parent
        parents = sorted(parent for parent, distance in entry["ancestors"].items() if distance == 1 and parent in kept)
        synonyms = sorted({one_line(synonym) for synonym in entry.get("synonyms", [])} - {entry["label"]})
        lines.append("\t".join((cl, one_line(entry["label"]), "|".join(synonyms), "|".join(parents))))
    data = gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=9, mtime=0)
    path.write_bytes(data)
    print(f"{path.name}: Cell Ontology {release}, {len(kept):,} terms, {len(data):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    write_table(parser.parse_args().output)
