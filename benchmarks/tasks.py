"""Cross-study annotation tasks on published cells: the studies trained on and tested, and how their names compare.

A task is a list of labelled training studies, each with all of its own genes, and one test study. Cell type names are
made comparable here, in explicit tables: `names` of a `Study` rename the labels of one file (``None`` drops the cells,
because the name says too little to be scored), and `coarsen` of a task maps *predictions* to the level at which the
test study is labelled (for example `activated_stellate` to `stellate`), so that a method is not charged for telling
more than the test study does.

Types that only the test study has are kept with ``known = False``: they count for the share of unknown cells rejected
and never for accuracy. A type counts as known as soon as one training cell has it, however few there are.

`TASKS` holds the evaluation tasks. `DEV_TASKS` is built from training studies only: tune on these and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

Names = dict[str, "str | None"]


@dataclass(frozen=True)
class Task:
    """One cross-study annotation task.

    Parameters
    ----------
    name
        Name of the task; the part before the last ``/`` is its family, which counts once in a mean over tasks.
    train
        Labelled training studies, each with its own genes. ``obs`` has ``label``, ``study`` and ``group`` (donor or
        batch).
    test
        Test study with its own genes; the same columns. Methods must not look at ``label``.
    species
        Species of the test cells, ``"human"`` or ``"mouse"``.
    known
        Mask of the test cells (n_cells,) whose type at least one training cell has.
    coarsen
        Names applied to predictions, and to training labels when asking what is known, before scoring.
    """

    name: str
    train: list[ad.AnnData]
    test: ad.AnnData
    species: str
    known: np.ndarray
    coarsen: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Name of the table's row, which the sub-tasks of one row share."""
        return self.name.rsplit("/", 1)[0]

    def comparable(self, labels: Sequence[str] | np.ndarray) -> np.ndarray:
        """Predicted `labels` at the level of the test study's labels."""
        return np.array([self.coarsen.get(str(label), str(label)) for label in labels], dtype=object)


@dataclass(frozen=True)
class Study:
    """One file as a task uses it: which labels, which cells, which genes."""

    file: str
    names: Names = field(default_factory=dict)
    labels: str = "cell_type"
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    genes: Callable[[ad.AnnData], np.ndarray] | None = None


@cache
def _read(name: str, data: Path) -> ad.AnnData:
    for species in ("human", "mouse"):
        path = data / "labelled" / species / f"{name}.h5ad"
        if path.is_file():
            cells = ad.read_h5ad(path)
            cells.uns["species"] = species
            return cells
    raise FileNotFoundError(f"no `{name}.h5ad` under `{data / 'labelled'}`")


def load(name: str, data: Path | str = DATA) -> ad.AnnData:
    """Cells of one published file, as stored: `X` CSR counts, ``uns["species"]`` set.

    Raises
    ------
    FileNotFoundError
        Where the folder does not hold the file.
    """
    return _read(name, Path(data)).copy()


def take(study: Study, data: Path) -> ad.AnnData:
    """Cells of a study that can be scored or trained on, with ``label``, ``study`` and ``group``."""
    cells = load(study.file, data)
    label = cells.obs[study.labels].astype(str)
    renamed = label.map(lambda name: study.names.get(name, name))
    keep = (renamed.notna() & (label != "unknown")).to_numpy()
    for column, values in study.only.items():
        keep &= cells.obs[column].astype(str).isin(values).to_numpy()
    cells.obs["label"] = renamed
    cells.obs["study"] = study.file
    group = next((column for column in ("donor", "batch") if column in cells.obs), None)
    cells.obs["group"] = study.file + ":" + (cells.obs[group].astype(str) if group else "all")
    cells = cells[keep].copy()
    if study.genes is not None:
        cells = cells[:, study.genes(cells)].copy()
    cells.X = sparse.csr_matrix(cells.X)
    return cells


def build(
    name: str, train: Sequence[Study], test: Study, coarsen: dict[str, str] | None = None, *, data: Path | str = DATA
) -> Task:
    """Read the studies of a task and say which test cells are of a known type."""
    folder = Path(data)
    coarsen = coarsen or {}
    training = [take(study, folder) for study in train]
    test_cells = take(test, folder)
    types = {str(label) for cells in training for label in cells.obs["label"].unique()}
    types |= {coarsen.get(label, label) for label in types}
    known = test_cells.obs["label"].isin(types).to_numpy()
    return Task(name, training, test_cells, str(test_cells.uns["species"]), known, coarsen)


# ----------------------------------------------------------------------------------------------------
# Names: human files say `cd4_t`, mouse files say `t cell`. One name a type on both sides of a task.

# Pancreas, mouse names to the human ones. `leukocyte` is "immune_other" in the study and overlaps t_cell, mast and
# macrophage.
MOUSE_PANCREAS: Names = {
    "alpha cell": "alpha",
    "beta cell": "beta",
    "delta cell": "delta",
    "pp cell": "gamma",
    "ductal cell": "ductal",
    "endothelial cell": "endothelial",
    "activated stellate cell": "activated_stellate",
    "quiescent stellate cell": "quiescent_stellate",
    "schwann cell": "schwann",
    "t cell": "t_cell",
    "b cell": "b",
    "leukocyte": None,
}
STELLATE = {"activated_stellate": "stellate", "quiescent_stellate": "stellate"}

# Blood. Regulatory T cells are CD4 T cells, and no training study of these tasks names them apart, so its `cd4_t` holds
# them.
TREG_IS_CD4: Names = {"treg": "cd4_t"}
MONOCYTE = {"cd14_monocyte": "monocyte", "fcgr3a_monocyte": "monocyte"}
# Automated labels: CD4 and CD8 mixed, and the FCER1A cells are inside the monocytes.
PBMC8K = {**MONOCYTE, "cd4_t": "t", "cd8_t": "t", "dendritic": "monocyte"}
# Labels of the small blood set put the LILRA4 cells, plasmacytoid, with the dendritic ones.
ALL_DENDRITIC = {"pdc": "dendritic"}
# Studies without the innate-like T cells keep them with CD8 T cells, whose cytotoxic programme they share.
INNATE_LIKE_T = {"gdt": "cd8_t", "mait": "cd8_t"}

# Lung lavage is labelled broadly. Its `macrophage` takes in the monocyte-like FCN1 cells (it has no monocytes), and
# tumour cells of an adenocarcinoma are epithelial.
LAVAGE = {"monocyte": "macrophage", "malignant": "epithelial"}

# Kim: `t` mixes CD4 and CD8 cells, so it cannot be scored at that level. Myofibroblasts are fibroblasts in both broad
# tables.
KIM_TYPES: Names = {"treg": "cd4_t", "t": None, "myofibroblast": "fibroblast"}
# Secretory cells: `bronchial_epithelial` (SCGB3A2) and `goblet` (SCGB1A1, MUC5B) of one study are `club` (both) in the
# other.
LUNG_TYPES = {
    **MONOCYTE,
    "lymphatic_endothelial": "endothelial",
    "bronchial_epithelial": "club",
    "goblet": "club",
}
KIM_IMMUNE = ("cd4_t", "cd8_t", "t", "treg", "b", "nk", "macrophage", "monocyte", "dendritic", "mast", "plasma")

# Mouse lung, at the level of the one adult study with many types, whose `leukocyte` are neutrophils (29 cells, S100a8,
# Retnlg and Csf3r on top). `endothelial/fibroblast` names no one type, and transdifferentiating cells are between two.
TM_LUNG: Names = {
    "classical monocyte": "monocyte",
    "non-classical monocyte": "monocyte",
    "leukocyte": "neutrophil",
}
RIEMONDY: Names = {
    "injured at2: other": "at2",
    "injured at2: cell cycle arrest": "at2",
    "injured at2: proliferating": "at2",
    "injured at2: transdifferentiating": None,
    "endothelial/fibroblast": None,
}
LUNG_DEVELOPMENT: Names = {
    **dict.fromkeys(
        [
            "alveolar fibroblast (wnt2-pdgfra)",
            "secondary crest myofibroblast",
            "adventitial fibroblast (mfap5-pdgfra)",
            "proliferating mesenchymal cell",
            "ductal myofibroblast",
            "pericyte (pdgfrb)",
            "early mesenchymal cell",
            "vascular smooth muscle cell",
            "airway smooth muscle cell",
        ],
        "stromal cell",
    ),
    **dict.fromkeys(
        [
            "general capillary endothelial cell",
            "aerocyte capillary endothelial cell",
            "arterial endothelial cell",
            "proliferating capillary endothelial cell",
            "venous endothelial cell",
            "lymphatic endothelial cell",
        ],
        "endothelial cell",
    ),
    "proliferating at2": "at2",
    "transitional at1-at2": None,
    "interstitial macrophage": "macrophage",
    "alveolar macrophage": "macrophage",
}
MOUSE_LUNG_MACROPHAGE = {
    "alveolar macrophage": "macrophage",
    "dendritic cell / interstitial macrophage": "macrophage",
}

# Mouse immune cells to the human names, for the species shift.
MOUSE_IMMUNE: Names = {"b cell": "b", "nk cell": "nk", "t cell": "t"}

# Mouse brain: two subsets of one atlas with disjoint subclasses; the class above them is what they share.
BRAIN_1: Names = {"telencephalon inhibitory interneuron": "inhibitory neuron", "microglia": "brain macrophage"}
BRAIN_2: Names = {"diencephalon inhibitory neuron": "inhibitory neuron", "perivascular macrophage": "brain macrophage"}

# The genes a pancreas panel would be built around; taken out to see what is left without them.
PANCREAS_TYPES = ("alpha", "beta", "delta", "gamma", "ductal", "acinar", "endothelial", "activated_stellate")


@cache
def _pancreas_markers(data: Path, n_genes: int = 200) -> frozenset[str]:
    """Genes highest above the mean of the other types, in turn over the types of baron_human (a training study)."""
    cells = load("baron_human", data)
    counts = sparse.csr_matrix(cells.X, dtype=np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    logged = (sparse.diags(1e4 / totals) @ counts).tocsr()
    logged.data = np.log1p(logged.data)
    label = cells.obs["cell_type"].astype(str).to_numpy()
    means = np.vstack([np.asarray(logged[label == kind].mean(axis=0)).ravel() for kind in PANCREAS_TYPES])
    ranked = [
        np.argsort(-(row - np.delete(means, i, axis=0).mean(axis=0)), kind="stable") for i, row in enumerate(means)
    ]
    chosen: dict[str, None] = {}
    for turn in range(means.shape[1]):
        for order in ranked:
            chosen.setdefault(str(cells.var_names[order[turn]]))
            if len(chosen) == n_genes:
                return frozenset(chosen)
    return frozenset(chosen)


def _panel(cells: ad.AnnData, *, seed: int, data: Path, n_genes: int = 2000) -> np.ndarray:
    """Mask of a random panel of genes without the 200 strongest markers.

    The genes are drawn among those of baron_human, by name, so a panel is the same in every test study but for the
    genes it lacks.
    """
    reference = sorted(set(load("baron_human", data).var_names) - _pancreas_markers(data))
    panel = np.random.default_rng(seed).choice(reference, size=n_genes, replace=False)
    return cells.var_names.isin(panel)


# ----------------------------------------------------------------------------------------------------
# The tasks. Each value builds its task when called, so that listing them reads nothing.


Entry = tuple[str, Callable[..., Task]]


def _task(name: str, train: Sequence[Study], test: Study, coarsen: dict[str, str] | None = None) -> Entry:
    return name, partial(build, name, train, test, coarsen)


def _donors(file: str, donors: Sequence[str]) -> Study:
    return Study(file, only={"donor": donors})


def _panel_task(name: str, test: str, seed: int) -> Entry:
    def make(data: Path | str = DATA) -> Task:
        genes = partial(_panel, seed=seed, data=Path(data))
        return build(name, [BARON], Study(test, genes=genes), STELLATE, data=data)

    return name, make


BARON = Study("baron_human")
PBMC4K = Study("pbmc4k_labelled")
TECHNOLOGIES = {
    "indrop": "inDrop",
    "celseq": "CEL-seq",
    "celseq2": "CEL-seq2",
    "fluidigm": "Fluidigm C1",
    "smartseq2": "Smart-seq2",
}
LUNG_DONORS = ("1", "2", "3")

# Tasks that test on training studies only: they serve evaluation and tuning.
_BOTH: list[Entry] = [
    _task("immune-1", [Study("pbmc3k")], Study("kang_pbmc")),
    _task("immune-2", [Study("kang_pbmc")], Study("pbmc3k")),
    _task("pancreas-1", [_donors("baron_human", ["human1", "human2", "human3"])], _donors("baron_human", ["human4"])),
    _task("pancreas-2/muraro", [BARON], Study("muraro_pancreas"), STELLATE),
    _task("pancreas-2/fasolino", [BARON], Study("fasolino_pancreas"), STELLATE),
    *(
        _task(
            f"lung-2/donor{donor}",
            [_donors("travaglini_lung_subset", [other for other in LUNG_DONORS if other != donor])],
            _donors("travaglini_lung_subset", [donor]),
        )
        for donor in LUNG_DONORS
    ),
]

_TEST: list[Entry] = [
    _task("immune-3", [Study("pbmc3k"), Study("kang_pbmc"), PBMC4K], Study("zheng_sorted_facs", TREG_IS_CD4)),
    _task(
        "immune-4",
        [PBMC4K, Study("liu_covid_pbmc")],
        Study("hao_small_pbmc", TREG_IS_CD4),
        {**MONOCYTE, **INNATE_LIKE_T},
    ),
    _task("immune-5/symphony", [PBMC4K], Study("symphony_pbmc_2tech"), ALL_DENDRITIC),
    _task("immune-5/ding_drop_seq", [PBMC4K], Study("ding_pbmc_drop_seq")),
    _task("immune-5/ding_indrops", [PBMC4K], Study("ding_pbmc_indrops")),
    _task("pancreas-2/tritschler", [BARON], Study("tritschler_pancreas"), STELLATE),
    *(
        _task(f"pancreas-3/{short}", [BARON], Study("panc8_small_5tech", only={"technology": [technology]}))
        for short, technology in TECHNOLOGIES.items()
    ),
    _task("pancreas-4", [BARON], Study("baron_mouse_pancreas", MOUSE_PANCREAS)),
    _task(
        "lung-1",
        [Study(file, labels="cell_type_broad") for file in ("travaglini_lung_subset", "kim_luad_multitissue")],
        Study("liao_balf_covid"),
        LAVAGE,
    ),
    _task(
        "mouse-lung",
        [
            Study("tm_lung_10x_P7_8", TM_LUNG),
            Study("zilionis_lung_immune"),
            Study("nkx21_lung_at2"),
            Study("riemondy_lung_injury_subset", RIEMONDY),
        ],
        Study("lung_development_atlas_subset", LUNG_DEVELOPMENT),
        MOUSE_LUNG_MACROPHAGE,
    ),
]

_DEV: list[Entry] = [
    _task("dev-pbmc4k-pbmc8k", [PBMC4K], Study("pbmc8k_labelled"), PBMC8K),
    _task("dev-liu-pbmc4k", [Study("liu_covid_pbmc")], PBMC4K, INNATE_LIKE_T),
    _task("dev-pbmc4k-onek1k", [PBMC4K], Study("onek1k_subset")),
    _task(
        "dev-travaglini-kim", [Study("travaglini_lung_subset")], Study("kim_luad_multitissue", KIM_TYPES), LUNG_TYPES
    ),
    _task(
        "dev-zeisel1-zeisel2",
        [Study("zeisel2018_brain_subset", BRAIN_1)],
        Study("zeisel2018_brain_subset2", BRAIN_2),
    ),
    _task("dev-tm_lung-zilionis", [Study("tm_lung_10x_P7_8", TM_LUNG)], Study("zilionis_lung_immune")),
    _panel_task("dev-baron-muraro-panel/1", "muraro_pancreas", 1),
    _panel_task("dev-baron-muraro-panel/2", "muraro_pancreas", 2),
    _panel_task("dev-baron-fasolino-panel/1", "fasolino_pancreas", 1),
    _panel_task("dev-baron-fasolino-panel/2", "fasolino_pancreas", 2),
    _task(
        "dev-human-zilionis",
        [
            Study("pbmc4k_labelled", dict(MONOCYTE)),
            Study("kim_luad_multitissue", only={"cell_type": KIM_IMMUNE}),
        ],
        Study("zilionis_lung_immune", MOUSE_IMMUNE),
        {"cd4_t": "t", "cd8_t": "t", "treg": "t"},
    ),
]

TASKS: dict[str, Callable[..., Task]] = dict(sorted([*_BOTH, *_TEST]))
DEV_TASKS: dict[str, Callable[..., Task]] = dict([*_BOTH, *_DEV])


# ----------------------------------------------------------------------------------------------------
# Shared genes, for methods that need one gene space.


def gene_names(cells: ad.AnnData, *, to_human: bool = False) -> np.ndarray:
    """One canonical name a gene (n_genes,); mouse genes by their one-to-one human orthologue if asked."""
    from evercell.genes import canonical_genes, orthologues

    found = canonical_genes(cells.var)
    names = found.names.astype(str)
    if to_human and found.species == "mouse":
        table = orthologues(names, to="human")
        names = np.array([table.get(name, name) for name in names])
    return names


def shared_genes(
    train: Sequence[ad.AnnData], test: ad.AnnData
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray]:
    """Counts over the genes that every training study and the test study have.

    Returns
    -------
    train, test, genes
        CSR float32 of shape (n_train, n_shared) and (n_test, n_shared), training studies stacked in order, and gene
        names in alphabetical order. Genes that share a name within a study are added up.
    """
    studies = [*train, test]
    mixed = len({cells.uns.get("species") for cells in studies}) > 1
    named = [gene_names(cells, to_human=mixed) for cells in studies]
    shared = sorted(set.intersection(*(set(names) for names in named)))
    position = {name: i for i, name in enumerate(shared)}
    matrices = []
    for cells, names in zip(studies, named, strict=True):
        columns = np.array([position.get(name, -1) for name in names])
        rows = np.flatnonzero(columns >= 0)
        project = sparse.csr_matrix((np.ones(rows.size, np.float32), (rows, columns[rows])), (len(names), len(shared)))
        matrices.append(sparse.csr_matrix(sparse.csr_matrix(cells.X, dtype=np.float32) @ project))
    return sparse.vstack(matrices[:-1], format="csr"), matrices[-1], np.array(shared, dtype=object)


def shared_counts(task: Task) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray]:
    """`shared_genes` of a task's studies."""
    return shared_genes(task.train, task.test)
