"""The demonstration: real cells of the human pancreas, a model in a minute, studies that it has not seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evercell.errors import OutputError
from evercell.examples import EXAMPLES, describe, example_path, load_example
from evercell.model_card import model_card
from evercell.outputs import check_model_output

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

    from evercell.annotation import Annotation
    from evercell.annotator import Annotator
    from evercell.finetuning import ModelSettings

TRAINED_ON = "baron_stage1"
UNSEEN = ("tritschler_unseen", "fasolino_stage2", "muraro_stage3")
"""Studies that are annotated; the first is written and reported on."""

COARSER = {"activated_stellate": "stellate", "quiescent_stellate": "stellate"}
"""Types that only the training study splits: scored under the name that the others give both."""


@dataclass(frozen=True)
class StudyScores:
    """How well the cells of one unseen study were labelled.

    Parameters
    ----------
    study
        Name of the example.
    known_cells, other_cells
        Cells of types that the model knows, and cells of other types.
    accuracy, macro_f1
        Of the most probable types of the known cells.
    linear_accuracy, linear_macro_f1
        The same of the linear baseline, trained on the same cells.
    rejected_known, rejected_other
        Share of the known and of the other cells that were called Unknown; None where there are no such cells.
    """

    study: str
    known_cells: int
    other_cells: int
    accuracy: float
    macro_f1: float
    linear_accuracy: float
    linear_macro_f1: float
    rejected_known: float
    rejected_other: float | None


@dataclass(frozen=True)
class Demo:
    """What `run_demo` found, and where it lies.

    Parameters
    ----------
    output
        Folder with ``model``, ``annotated.h5ad``, ``labels.csv``, ``report.html``, and ``data``: the packaged studies.
    studies
        Scores of each unseen study.
    held_out
        Figures on held-out cells of the training study: ``model``, ``transformer`` and ``linear``.
    """

    output: Path
    studies: tuple[StudyScores, ...]
    held_out: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "output": str(self.output),
            "studies": [asdict(one) for one in self.studies],
            "held_out": dict(self.held_out),
        }

    def table(self) -> str:
        """Scores as text, the files below."""
        header = ("", "", "accuracy", "", "macro F1", "", "called Unknown")
        below = ("unseen study", "cells", "evercell", "linear", "evercell", "linear", "known types  other types")
        lines = [
            "{:<20}{:>6}{:>11}{:>9}{:>11}{:>9}{:>27}".format(*header),
            "{:<20}{:>6}{:>11}{:>9}{:>11}{:>9}{:>27}".format(*below),
        ]
        for one in self.studies:
            other = "none" if one.rejected_other is None else f"{one.rejected_other:.0%} of {one.other_cells}"
            lines.append(
                f"{one.study:<20}{one.known_cells:>6,}{one.accuracy:>11.3f}{one.linear_accuracy:>9.3f}"
                f"{one.macro_f1:>11.3f}{one.linear_macro_f1:>9.3f}{one.rejected_known:>14.0%}{other:>13}"
            )
        names = {
            "model": "the model, for `evercell annotate --model`",
            "annotated.h5ad": f"the cells of {UNSEEN[0]} with their labels",
            "labels.csv": "the labels as a table",
            "report.html": "a report, to be opened in a browser",
            "data": "the packaged studies, to teach the model further",
        }
        lines += ["", *(f"{self.output / name!s:<34} {words}" for name, words in names.items())]
        return "\n".join(lines)


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    settings: ModelSettings | None = None,
    device: str = "auto",
    shown: bool | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Demo:
    """Train on the packaged study of Baron et al., label the other packaged studies, and write what comes out.

    Parameters
    ----------
    output
        Folder; made if it is not there. What an earlier demonstration wrote is replaced.
    seed
        Of the training.
    settings
        Of the model; the defaults if None.
    device
        ``auto``, ``cpu`` or ``cuda``.
    shown
        Show progress bars; by default in a terminal.
    say
        Called with a sentence at each step.

    Returns
    -------
    Demo

    Raises
    ------
    OutputError, ModelError
        If the folder is a file, or ``model`` in it is something other than a model.
    """
    from evercell.annotation import annotate
    from evercell.cells import write_cells, write_table
    from evercell.checkpoint import save
    from evercell.finetuning import train
    from evercell.reporting import write_report

    output = Path(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"`{output}` is a file, and a folder is needed", hint="choose another --output")
    check_model_output(output / "model", overwrite=True)
    training = load_example(TRAINED_ON)
    say(f"training on {_called(TRAINED_ON)}")
    model = train(
        training, groups="donor", settings=settings, seed=seed, names=[TRAINED_ON], device=device, shown=shown
    )
    (output / "data").mkdir(parents=True, exist_ok=True)
    for name in EXAMPLES:
        shutil.copyfile(example_path(name), output / "data" / f"{name}.h5ad")
    save(model, output / "model", card=model_card(model), overwrite=True)
    linear = _linear_baseline(model, training, seed=seed)
    scores = []
    for name in UNSEEN:
        cells = load_example(name)
        say(f"annotating {_called(name)}")
        result = annotate(model, cells, name=name, model_name="model", device=device, shown=shown)
        scores.append(_scores(cells, result, linear(cells), study=name))
        if name == UNSEEN[0]:
            result.write_into(cells)
            write_cells(cells, output / "annotated.h5ad")
            write_table(result.obs.assign(cell_type=cells.obs["cell_type"]).rename_axis("cell"), output / "labels.csv")
            title = "Human pancreas: a study that was not trained on"
            stages = [stage.facts for stage in model.ledger]
            write_report(cells, output / "report.html", truth="cell_type", title=title, stages=stages)
    return Demo(output, tuple(scores), model.ledger.stages[-1].facts["metrics"])


def _called(name: str) -> str:
    """Name, size and publication of an example."""
    about = describe(name)
    return f"{name}: {about.n_cells:,} cells, {about.n_genes:,} genes ({about.source.split(';')[0]})"


def _scores(cells: AnnData, result: Annotation, linear_labels: np.ndarray, *, study: str) -> StudyScores:
    """Scores of one study."""
    import numpy as np

    from evercell.evaluation import evaluate

    truth = _coarse(cells.obs["cell_type"].astype(str).to_numpy())
    known = np.isin(truth, _coarse(np.asarray(result.types, dtype=object)))
    rejected = result.labels == "Unknown"
    found = evaluate(truth[known], _coarse(result.best_labels)[known])
    linear = evaluate(truth[known], _coarse(linear_labels)[known])
    return StudyScores(
        study=study,
        known_cells=int(known.sum()),
        other_cells=int((~known).sum()),
        accuracy=found.accuracy,
        macro_f1=found.macro_f1,
        linear_accuracy=linear.accuracy,
        linear_macro_f1=linear.macro_f1,
        rejected_known=float(rejected[known].mean()),
        rejected_other=float(rejected[~known].mean()) if not known.all() else None,
    )


def _linear_baseline(model: Annotator, training: AnnData, *, seed: int) -> Callable[[AnnData], np.ndarray]:
    """Logistic regression on the cells that the model was trained on; cells (B) -> names of types (B,)."""
    import numpy as np

    from evercell.cells import find_counts
    from evercell.genes import align
    from evercell.linear import fit_linear
    from evercell.tokenizers import View

    def view(cells: AnnData) -> View:
        counts = find_counts(cells)
        alignment = align(counts.genes, model.vocabulary)
        return View.whole(alignment.apply(counts.to_csr()), alignment.measured)

    codes = model.types.codes(training.obs["cell_type"].astype(str))
    linear = fit_linear(view(training).counts, codes, n_types=len(model.types), seed=seed)
    names = np.asarray(model.types.names, dtype=object)
    return lambda cells: names[linear.log_proba(view(cells)).argmax(axis=1)]


def _coarse(labels: np.ndarray) -> np.ndarray:
    """Names of types as all studies have them (B,)."""
    import numpy as np

    return np.array([COARSER.get(str(name), str(name)) for name in labels], dtype=object)
