"""Streams of labelled studies, learned one after the other: what `stream.py` measures continual learning on.

A stage is a labelled study (or some of its donors, or one condition) with a part kept for test: whole donors or batches
where the study tells at least three of them, cells drawn at random by type where not. Names of cell types are made
comparable by explicit tables, those of `tasks.py`; `coarsen` brings truth and predictions to the level that all studies
of a stream share, because a later study may tell apart what an earlier one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
from tasks import DATA, INNATE_LIKE_T, LAVAGE, MONOCYTE, STELLATE, TM_LUNG, TREG_IS_CD4, Study, take

from evercell.evaluation import split_cells

TEST_SHARE = 0.25


@dataclass(frozen=True)
class Part:
    """One stage of a stream, or a study that is never learnt.

    Parameters
    ----------
    name
        Name in tables.
    train
        Cells to learn, ``obs["label"]`` and ``obs["group"]``; None for a study that is never learnt.
    test
        Cells kept for test.
    split_by
        ``groups`` where whole donors or batches were kept for test, ``cells`` where not.
    """

    name: str
    train: ad.AnnData | None
    test: ad.AnnData
    split_by: str


@dataclass(frozen=True)
class Stream:
    """Studies in the order in which they are learnt, and studies to test on that are never learnt."""

    name: str
    stages: dict[str, Sequence[Study]]
    unseen: dict[str, Study] = field(default_factory=dict)
    coarsen: dict[str, str] = field(default_factory=dict)
    coarser: dict[str, dict[str, str]] = field(default_factory=dict)
    """Further names for one unseen study, which is labelled more coarsely than the stages."""

    def parts(self, order: str, seed: int, data: Path | str = DATA) -> tuple[list[Part], list[Part]]:
        """Stages in ``forward`` or ``reversed`` order, split by `seed`, and the unseen studies."""
        folder = Path(data)
        learnt = [_split(name, [take(one, folder) for one in studies], seed) for name, studies in self.stages.items()]
        unseen = [Part(name, None, take(study, folder), "whole study") for name, study in self.unseen.items()]
        return (learnt if order == "forward" else learnt[::-1]), unseen

    def comparable(self, labels: Sequence[str] | np.ndarray, part: str) -> np.ndarray:
        """Labels at the level at which a part is scored."""
        names = {**self.coarsen, **self.coarser.get(part, {})}
        return np.array([names.get(str(label), str(label)) for label in labels], dtype=object)


def _split(name: str, studies: list[ad.AnnData], seed: int) -> Part:
    cells = studies[0] if len(studies) == 1 else ad.concat(studies, join="inner", uns_merge="first", index_unique="-")
    label, group = cells.obs["label"].astype(str).to_numpy(), cells.obs["group"].astype(str).to_numpy()
    codes = np.unique(label, return_inverse=True)[1]
    several = len(np.unique(group)) >= 3
    split = split_cells(codes, group if several else None, test_share=TEST_SHARE, seed=seed)
    return Part(name, cells[split.train].copy(), cells[split.validation].copy(), split.by)


def _kang(condition: str) -> Study:
    return Study("kang_pbmc", only={"condition": [condition]})


def _donor(number: int) -> Study:
    return Study("baron_human", only={"donor": [f"human{number}"]})


STREAMS: dict[str, Stream] = {
    stream.name: stream
    for stream in [
        Stream(
            "pancreas",
            {
                "muraro": [Study("muraro_pancreas")],
                "baron": [Study("baron_human")],
                "fasolino": [Study("fasolino_pancreas")],
            },
            {"tritschler": Study("tritschler_pancreas"), "panc8": Study("panc8_small_5tech")},
            STELLATE,
        ),
        Stream("pancreas-donors", {f"human{i}": [_donor(i)] for i in (1, 2, 3)}, {"human4": _donor(4)}, STELLATE),
        # Small enough for CANAL's own settings on two cores.
        Stream("pancreas-small", {"muraro": [Study("muraro_pancreas")], "human1": [_donor(1)]}, {}, STELLATE),
        Stream(
            "immune",
            {
                "pbmc3k": [Study("pbmc3k")],
                "kang ctrl": [_kang("ctrl")],
                "kang ifnb": [_kang("ifnb_stim")],
                "pbmc4k": [Study("pbmc4k_labelled")],
                "liu": [Study("liu_covid_pbmc")],
            },
            {"zheng": Study("zheng_sorted_facs", TREG_IS_CD4), "hao": Study("hao_small_pbmc", TREG_IS_CD4)},
            INNATE_LIKE_T,
            {"hao": MONOCYTE},
        ),
        Stream(
            "lung",
            {
                "travaglini": [Study("travaglini_lung_subset", labels="cell_type_broad")],
                "kim": [Study("kim_luad_multitissue", labels="cell_type_broad")],
            },
            {"liao": Study("liao_balf_covid")},
            LAVAGE,
        ),
        Stream(
            "mouse",
            {
                "lung": [Study("tm_lung_10x_P7_8", TM_LUNG)],
                "bone marrow": [Study("paul15_bone_marrow_progenitors")],
                "epidermis": [Study("joost_epidermis_ife")],
                "brain": [Study("zeisel2018_brain_subset"), Study("zeisel2018_brain_subset2")],
                "pancreas": [Study("pancreas_e15_endocrinogenesis")],
            },
            {
                "baron mouse": Study("baron_mouse_pancreas"),
                "jaitin spleen": Study("jaitin_spleen_sorted"),
            },
        ),
        Stream(
            "tissues",
            {
                "blood": [Study("pbmc4k_labelled")],
                "brain": [Study("habib_brain_nuclei")],
                "pancreas": [Study("baron_human")],
                "heart": [Study("heart_san_nuclei")],
                "retina": [Study("retina_nuclei")],
                "lung": [Study("travaglini_lung_subset")],
                "breast tumour": [Study("breast_tumour_CID4471")],
            },
        ),
        Stream("liu", {f"batch {i}": [Study("liu_covid_pbmc", only={"batch": [f"B{i}"]})] for i in (1, 2, 3)}),
    ]
}
