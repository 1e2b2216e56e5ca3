"""Do the genes that `explain` names carry the label? They are removed, and the model is asked again.

    python benchmarks/deletion.py [--cells 40] [--draws 5] [--seed 0] [--studies zheng tritschler lung-development]

Cells of studies that the packaged models have never seen; nothing is tuned on them. Of each study `--cells` cells are
drawn, spread evenly over the labels that the model gives. Of every cell genes are removed (their counts taken out, the
total left as it was) in the order of

- `integrated`: contributions by integrated gradients, the default of `explain`;
- `gradient`: gradient times expression at the cell;
- `expression`: the most expressed genes first;
- `random`: genes that each stand next in expression to one of the genes of `integrated`, mean of `--draws` draws;

and the table gives the mean fall of the probability of the label, with its standard error over cells, and the area
under the curve of that probability from 0 to 50 removed genes (1 where nothing falls, if it was 1 before).

The second table counts canonical markers (`CANONICAL`, from textbooks and reviews, written down before the run) among
the 20 first genes of each label with at least ten cells, beside the 20 most expressed genes of the same cells.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
from tasks import DATA, LUNG_DEVELOPMENT, STELLATE, Study, take

import evercell as ec
from evercell.explaining.cells import Expression, Piece, Sources, proba_without
from evercell.explaining.contributions import contributions
from evercell.explaining.removal import alike
from evercell.labelling import Asked

SIZES = (5, 10, 20, 50)
METHODS = ("integrated", "gradient", "expression", "random")
FEWEST = 10  # cells of a label whose markers are counted
TOP = 20


@dataclass(frozen=True)
class Query:
    """A test study and the packaged model that labels it."""

    model: str
    study: Study


QUERIES = {
    "zheng": Query("human-immune", Study("zheng_sorted_facs")),
    "tritschler": Query("human-pancreas", Study("tritschler_pancreas", STELLATE)),
    "lung-development": Query("mouse-lung", Study("lung_development_atlas_subset", LUNG_DEVELOPMENT)),
}

CANONICAL = {
    "b": "MS4A1 CD79A CD79B CD19 BANK1 CD74",
    "plasma": "JCHAIN MZB1 SDC1 IGHG1 XBP1 DERL3",
    "cd4_t": "CD4 CD3D CD3E IL7R LTB CCR7 LDHB TCF7",
    "cd8_t": "CD8A CD8B CD3D CD3E GZMK CCL5",
    "treg": "FOXP3 IL2RA CTLA4 CD3D",
    "gdt": "TRDC TRGC1 TRDV2 TRGV9 KLRD1",
    "mait": "SLC4A10 KLRB1 TRAV1-2 ZBTB16",
    "nk": "NKG7 GNLY KLRD1 KLRF1 NCAM1 FCGR3A TYROBP FCER1G SPON2",
    "cd14_monocyte": "CD14 LYZ S100A8 S100A9 FCN1 VCAN LGALS2",
    "fcgr3a_monocyte": "FCGR3A MS4A7 CDKN1C LST1 RHOC",
    "dendritic": "FCER1A CD1C CLEC10A HLA-DQA1 CST3",
    "pdc": "LILRA4 IL3RA CLEC4C GZMB TCF4 IRF7",
    "megakaryocyte": "PPBP PF4 GNG11 SDPR CAVIN2 ITGA2B GP9",
    "erythroid": "HBB HBA1 HBA2 ALAS2 AHSP",
    "alpha": "GCG TTR ARX LOXL4 IRX2 GC CRYBA2",
    "beta": "INS IAPP MAFA PDX1 NKX6-1 DLK1 ADCYAP1",
    "delta": "SST HHEX LEPR RBP4 BCHE",
    "gamma": "PPY MEIS2 ETV1 ID4 SERTM1",
    "acinar": "PRSS1 CPA1 CTRB1 CTRB2 REG1A CELA3A SPINK1",
    "ductal": "KRT19 CFTR SOX9 KRT7 MUC1 TACSTD2 ANXA4",
    "stellate": "COL1A1 COL1A2 COL3A1 PDGFRB RGS5 SPARC",
    "activated_stellate": "COL1A1 COL1A2 COL3A1 PDGFRA LUM SPARC",
    "quiescent_stellate": "RGS5 PDGFRB COL1A1 FABP4 CSPG4 NDUFA4L2",
    "endothelial": "PECAM1 VWF CDH5 KDR CLDN5 EGFL7 RAMP2",
    "macrophage": "CD68 C1QA C1QB MARCO CD14 MRC1 LYZ LYZ2 CTSS",
    "alveolar macrophage": "Marco Mrc1 Chil3 Ear2 Siglecf Cd68 Lpl",
    "at2": "Sftpc Sftpb Sftpa1 Abca3 Lamp3 Lyz2",
    "b cell": "Ms4a1 Cd79a Cd79b Cd19 Cd74",
    "dendritic cell / interstitial macrophage": "Cd74 H2-Ab1 H2-Eb1 H2-Aa C1qa C1qb Flt3 Cd209a",
    "endothelial cell": "Pecam1 Cdh5 Kdr Cldn5 Egfl7 Ramp2 Vwf",
    "monocyte": "Ly6c2 Ccr2 Cd14 Lyz2 Csf1r Plac8",
    "neutrophil": "S100a8 S100a9 Csf3r Retnlg Il1b",
    "nk cell": "Nkg7 Klrd1 Ncr1 Gzma Klrb1c",
    "stromal cell": "Col1a1 Col1a2 Col3a1 Dcn Mfap4 Pdgfra",
    "t cell": "Cd3d Cd3e Cd3g Trbc2 Cd8a Cd4",
    "basal cell": "Krt5 Krt14 Trp63 Krt15",
    "club cell": "Scgb1a1 Scgb3a2 Cyp2f2 Aldh1a1",
}
"""Markers of types under the names that the models know them by; others are not counted."""


def orders(piece: Piece, first: int, second: int) -> dict[str, np.ndarray]:
    """Genes of one cell in the order of each method; only expressed ones, and only those for the label."""
    expression = piece.view.logged().toarray()[0]
    found = {}
    for method in ("integrated", "gradient"):
        total = contributions(piece.model, piece.view, first, second, method=method).total[0]
        ranked = np.argsort(-total, kind="stable")
        found[method] = ranked[(total[ranked] > 0) & (expression[ranked] > 0)]
    ranked = np.argsort(-expression, kind="stable")
    found["expression"] = ranked[expression[ranked] > 0]
    return found


def deleted(sources: Sources, rows: np.ndarray, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Probability of the label of each cell (B, 1 + sizes) after so many genes were removed, by method."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    nothing = np.zeros(0, dtype=np.int64)
    for row in rows:
        (piece,) = sources.pieces(np.array([row]))
        first, second = np.argsort(-piece.outputs.log_proba[0], kind="stable")[:2]
        ordered = orders(piece, int(first), int(second))
        expression = piece.view.logged().toarray()[0]
        sets = [nothing, *(genes[:size] for genes in ordered.values() for size in SIZES)]
        sets += [alike(expression, ordered["integrated"][:size], rng) for size in SIZES for _ in range(draws)]
        proba = proba_without((piece,), sets)[:, 0, first].astype(np.float64)
        before, rest = proba[:1], proba[1:]
        for place, method in enumerate(ordered):
            found[method].append(np.concatenate([before, rest[place * len(SIZES) : (place + 1) * len(SIZES)]]))
        random = rest[len(ordered) * len(SIZES) :].reshape(len(SIZES), draws).mean(axis=1)
        found["random"].append(np.concatenate([before, random]))
    return {method: np.stack(rows) for method, rows in found.items()}


def spread(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Rows of so many cells, spread evenly over the labels."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels), dtype=np.int64)  # of each cell among those of its label
    for label in np.unique(labels):
        of = shuffled[labels[shuffled] == label]
        place[of] = np.arange(len(of))
    return np.sort(shuffled[np.argsort(place[shuffled], kind="stable")][:number])


def canonical(found: ec.Explanation, sources: Sources, rows: dict[str, np.ndarray]) -> list[tuple[str, ...]]:
    """Of each label: its canonical markers among its 20 first genes, and among its 20 most expressed genes."""
    table = []
    for one in found.reasons:
        if one.cells < FEWEST or one.label not in CANONICAL:
            continue
        pieces = sources.pieces(rows[one.name])
        expression = Expression.of(pieces, len(sources.symbols)).mean
        present = {str(gene).upper() for gene in sources.symbols[expression > 0]}
        known = {gene.upper() for gene in CANONICAL[one.label].split()} & present
        first = [gene for gene in one.for_label()[:TOP] if gene.upper() in known]
        most = [gene for gene in sources.symbols[np.argsort(-expression)[:TOP]] if str(gene).upper() in known]
        table.append(
            (f"{one.label} / {one.runner_up}", str(len(known)), str(len(first)), str(len(most)), ", ".join(first))
        )
    return table


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--studies", nargs="+", default=list(QUERIES), choices=list(QUERIES))
    asked = parser.parse_args()
    start = time.perf_counter()
    print("| study | genes by | " + " | ".join(f"{size} removed" for size in SIZES) + " | area |")
    print("|---|---|" + "---:|" * (len(SIZES) + 1))
    markers: list[tuple[str, ...]] = []
    for name in asked.studies:
        query = QUERIES[name]
        model, cells = ec.load(query.model), take(query.study, DATA)
        settings = Asked(None, None, "auto", None, True, 0.05, "keep", query.model, 4096, "cpu", False)
        sources = Sources.of(model, cells, settings, name)
        labels = ec.annotate(model, cells, reject="off", empty_cells="keep", shown=False).labels
        rows = spread(labels, asked.cells, asked.seed)
        found = deleted(sources, rows, asked.draws, asked.seed)
        for method, proba in found.items():
            drops = proba[:, :1] - proba[:, 1:]
            errors = drops.std(axis=0, ddof=1) / np.sqrt(len(drops))
            steps = np.diff([0, *SIZES]) / SIZES[-1]
            area = (steps * (proba[:, 1:] + proba[:, :-1]) / 2).sum(axis=1)
            shown = " | ".join(
                f"{drop:.3f} ± {error:.3f}" for drop, error in zip(drops.mean(axis=0), errors, strict=True)
            )
            error = area.std(ddof=1) / np.sqrt(len(area))
            print(f"| {name} ({len(rows)} cells) | {method} | {shown} | {area.mean():.3f} ± {error:.3f} |", flush=True)
        of_label = {one: np.flatnonzero(labels == one) for one in np.unique(labels)}
        large = [one for one, of in of_label.items() if len(of) >= FEWEST]
        why = ec.explain(model, cells, types=large, reject="off", max_cells=10, top=TOP, shown=False)
        markers += [(name, *row) for row in canonical(why, sources, of_label)]
    print(
        "\n| study | label / runner-up | markers expressed | among the 20 first | among the 20 most expressed | which |"
    )
    print("|---|---|---:|---:|---:|---|")
    for row in markers:
        print("| " + " | ".join(row) + " |")
    hits = [sum(int(row[place]) for row in markers) for place in (2, 3, 4)]
    some = sum(int(row[3]) > 0 for row in markers)
    print(
        f"\n{hits[1]} of {hits[0]} expressed markers are among the 20 first genes, {hits[2]} among the 20 most "
        f"expressed; {some} of {len(markers)} labels have at least one. {time.perf_counter() - start:.0f} seconds."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
