"""Make the gene tables that evercell ships (src/evercell/data/genes; its README states sources and licences).

    python runs/make_gene_tables.py --human-ids human_v44.csv.gz --mouse-ids mouse_vM23.csv.gz --orthologues 1to1.csv \
        --hgnc hgnc_entries.tsv --mgi mgi_entries.tsv \
        --release hg19.h5ad grch38_84.h5ad features_93.tsv.gz gencode_v32.txt

A release is a table of `id<TAB>symbol` or an .h5ad whose var holds `gene_ids` beside the symbols.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import pandas as pd

# Names of clones (AL627309.1) were given again to other genes from release to release.
CLONE = re.compile(r"\.\d+$")
TARGET = Path(__file__).resolve().parents[1] / "src" / "evercell" / "data" / "genes"


def read_table(path: Path, separator: str = "\t") -> pd.DataFrame:
    return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)


def read_release(path: Path) -> list[tuple[str, str]]:
    """(id, symbol) pairs of one annotation release."""
    if path.suffix == ".h5ad":
        with h5py.File(path) as file:
            var = file["var"]
            old = isinstance(var, h5py.Dataset)  # files of before anndata 0.7 keep a table, its index made unique
            symbols = var["gene_symbols" if old else "index"][...]
            names = [symbol.decode() for symbol in symbols]
            held = set(names)
            names = [base if (base := re.sub(r"-\d$", "", name)) in held else name for name in names]
            return [(i.decode(), name) for i, name in zip(var["gene_ids"][...], names, strict=True)]
    table = pd.read_csv(path, sep="\t", header=None, usecols=[0, 1], dtype=str, keep_default_na=False)
    return list(table.itertuples(index=False, name=None))


class Names:
    """Names other than the annotation's own symbols, each with the one gene that it means (keys without case)."""

    def __init__(self, genes: Mapping[str, str]) -> None:
        self.genes = dict(genes)  # id -> symbol
        by_symbol: dict[str, set[str]] = defaultdict(set)
        for identifier, symbol in genes.items():
            by_symbol[symbol.upper()].add(identifier)
        self.meaning = {s: next(iter(ids)) if len(ids) == 1 else "" for s, ids in by_symbol.items()}
        self.several = {s: ids for s, ids in by_symbol.items() if len(ids) > 1}
        self.rows: list[tuple[str, str, str]] = []  # name, id, kind

    def approved(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Symbols of the nomenclature committee: they choose among ids of one symbol, and may be newer."""
        pairs = list(pairs)
        chosen: dict[str, set[str]] = defaultdict(set)
        for symbol, identifier in pairs:
            if identifier in self.several.get(symbol.upper(), ()):
                chosen[symbol.upper()].add(identifier)
        for symbol, ids in self.several.items():
            # of two or more candidates the lowest, oldest id: the newer ones are read-through and patch copies;
            # more without a choice of the committee are a family (Y_RNA): no one gene is meant
            if symbol in chosen or len(ids) == 2:
                self.meaning[symbol] = min(chosen.get(symbol, ids))
            self.rows.append((symbol, self.meaning[symbol] or symbol, "symbol"))
        self.add(((s, i) for s, i in pairs if i in self.genes), kind="symbol")

    def add(self, pairs: Iterable[tuple[str, str]], *, kind: str, among: Mapping[str, set[str]] | None = None) -> None:
        """Add names that mean one gene only and are no symbol yet."""
        meanings: dict[str, set[str]] = defaultdict(set)
        for name, identifier in pairs:
            meanings[name.upper()].add(identifier)
        for name, ids in meanings.items():
            allowed = (among or {}).get(name)
            if name and name not in self.meaning and len(ids) == 1 and (allowed is None or ids <= allowed):
                self.meaning[name] = next(iter(ids))
                self.rows.append((name, self.meaning[name], kind))

    def _followers(self, retired: Mapping[str, set[str]]) -> dict[str, str]:
        """The one gene that all symbols of a retired id mean, clone names aside."""
        meant = {i: {self.meaning.get(s, "") for s in names if not CLONE.search(s)} for i, names in retired.items()}
        return {i: next(iter(m)) for i, m in meant.items() if len(m) == 1 and "" not in m}

    def releases(self, pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
        """Older releases: a retired id means the gene that has its symbol now, an old symbol the gene of its id."""
        pairs = list(dict.fromkeys(pairs))
        retired: dict[str, set[str]] = defaultdict(set)
        for identifier, symbol in pairs:
            if identifier not in self.genes:
                retired[identifier].add(symbol.upper())
        follows = self._followers(retired)
        candidates: dict[str, set[str]] = defaultdict(set)
        for identifier, symbol in pairs:
            candidates[symbol.upper()].add(follows.get(identifier, identifier))
        # a gene that is still annotated is meant rather than a retired id of the same symbol
        kept = {
            s: ids if CLONE.search(s) else {i for i in ids if i in self.genes} or ids for s, ids in candidates.items()
        }
        self.add(((s, i) for s, ids in kept.items() for i in ids), kind="release")
        follows = {i: i for i in retired} | self._followers(retired)
        self.rows += [(i, target, "id") for i, target in follows.items()]
        return {s: ids for s, ids in kept.items() if s not in self.meaning}


def write(name: str, rows: Iterable[tuple[str, ...]]) -> None:
    text = "".join("\t".join(row) + "\n" for row in sorted(rows))
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0, filename="") as file:
        file.write(text.encode())
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / name).write_bytes(buffer.getvalue())
    print(f"{name}: {text.count(chr(10)):,} rows, {len(buffer.getvalue()) / 1e3:,.0f} kB")


def one_to_one(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    frame = pd.DataFrame(sorted({(h, m) for h, m in pairs if h and m}), columns=["human", "mouse"])
    frame = frame[~frame["human"].duplicated(keep=False) & ~frame["mouse"].duplicated(keep=False)]
    return set(frame.itertuples(index=False, name=None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("--human-ids", "--mouse-ids", "--orthologues", "--hgnc", "--mgi"):
        parser.add_argument(argument, type=Path, required=True)
    parser.add_argument("--release", type=Path, nargs="*", default=[], help="older human releases, the oldest first")
    options = parser.parse_args()

    hgnc = read_table(options.hgnc)
    hgnc = hgnc[(hgnc["Status"] == "Approved") & (hgnc["Ensembl gene ID"] != "")]
    human = Names(dict(read_table(options.human_ids, ",").itertuples(index=False, name=None)))
    human.approved(zip(hgnc["Approved symbol"], hgnc["Ensembl gene ID"], strict=True))
    unsettled = human.releases(pair for path in options.release for pair in read_release(path))
    for column, kind in (("Previous symbols", "previous"), ("Alias symbols", "alias")):
        pairs = zip(hgnc[column].str.split(", "), hgnc["Ensembl gene ID"], strict=True)
        human.add(((n, i) for names, i in pairs for n in names if i in human.genes), kind=kind, among=unsettled)

    mgi = read_table(options.mgi)
    mgi = mgi[mgi["ensembl"] != ""]
    genes = dict(read_table(options.mouse_ids, ",").itertuples(index=False, name=None))
    known = {symbol.upper() for symbol in genes.values()}
    genes |= {
        i: s for s, i in zip(mgi["symbol"], mgi["ensembl"], strict=True) if i not in genes and s.upper() not in known
    }
    mouse = Names(genes)
    mouse.approved(zip(mgi["symbol"], mgi["ensembl"], strict=True))
    mouse.releases((i, s) for s, i in zip(mgi["symbol"], mgi["ensembl"], strict=True) if i not in genes)
    pairs = zip(mgi["synonyms"].str.split("|"), mgi["ensembl"], strict=True)
    mouse.add(((n, i) for names, i in pairs for n in names if i in genes), kind="alias")

    table = read_table(options.orthologues, ",")
    agreed = one_to_one(
        (human.meaning.get(h.upper(), ""), mouse.meaning.get(m.upper(), ""))
        for h, m in zip(table["human"], table["mouse"], strict=True)
    )
    accessions = {f"MGI:{a}": i for a, i in zip(mgi["ID"], mgi["ensembl"], strict=True)}
    listed = zip(hgnc["Ensembl gene ID"], hgnc["Mouse genome database ID(supplied by MGI)"], strict=True)
    curated = one_to_one((h, mouse.meaning.get(accessions.get(m, ""), accessions.get(m, ""))) for h, m in listed)
    taken = {name for pair in agreed for name in pair}
    # only genes with ids that the tables hold, and none that the agreed table pairs otherwise
    more = {(h, m) for h, m in curated if h in human.genes and m in mouse.genes and not {h, m} & taken}
    print(f"orthologues: {len(agreed):,} agreed, {len(more):,} more from HGNC")

    for species, names in (("human", human), ("mouse", mouse)):
        write(f"{species}_genes.tsv.gz", names.genes.items())
        write(f"{species}_names.tsv.gz", ((n, "" if i == n else i, k) for n, i, k in names.rows))
        print(f"{species}:", pd.Series([k for *_, k in names.rows]).value_counts().to_dict())
    write("orthologues.tsv.gz", agreed | more)


if __name__ == "__main__":
    main()
