"""`EvercellClassifier`: evercell as a scikit-learn estimator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_feature_names, check_is_fitted, column_or_1d, validate_data

from evercell.annotation import Annotation, annotate
from evercell.annotator import Annotator
from evercell.colours import UNKNOWN
from evercell.errors import CellsError, GenesError, LabelsError, SettingsError
from evercell.finetuning import ModelSettings, train
from evercell.labels import is_unassigned
from evercell.registry import load
from evercell.updating import UpdateSettings
from evercell.updating.update import update

if TYPE_CHECKING:
    from anndata import AnnData

    Cells: TypeAlias = AnnData | pd.DataFrame | np.ndarray | sp.spmatrix

LABELS, GROUPS = "cell_type", "group"  # columns of the AnnData that trainings are given
TOTAL = 10_000  # counts of a typical cell, to which values that are no counts are brought


class EvercellClassifier(ClassifierMixin, BaseEstimator):
    """Cell types from counts, with scikit-learn's methods.

    Cells are given as an AnnData, a DataFrame of cells by genes, an array or a sparse matrix. An AnnData is matched to
    the model by the names of its genes, whatever genes it holds; the others must have the columns of `fit`.

    Parameters
    ----------
    base
        Pretrained model to start from: a name, a directory or an `Annotator`. It needs names of genes.
    settings, update_settings
        How `fit` trains (see `ModelSettings`), and how `partial_fit` does (see `UpdateSettings`).
    strategy
        How `partial_fit` keeps what earlier stages learnt, a name of `STRATEGIES`.
    genes
        Names of the columns of arrays and sparse matrices; `feature0`, `feature1`, ... if not given.
    values
        ``"counts"``, or ``"expression"`` for other values that are not negative, such as TPM: they are scaled by one
        factor, found in `fit`, and rounded.
    species
        ``human``, ``mouse`` or ``auto``.
    reject
        None: `predict` labels every cell. A share of cells of known types that may be called unknown (0 to 1), or
        ``"model"`` for the one that the model chose at its training: the others are `unknown_label`.
    unknown_label
        What `predict` says of cells of no known type.
    random_state
        Seed of trainings.
    device
        ``auto``, ``cpu`` or ``cuda``.
    verbose
        Show progress bars.

    Attributes
    ----------
    classes_
        Cell types (K), sorted; the columns of `predict_proba`.
    model_
        The `Annotator`; ``ec.save(classifier.model_, "model")`` writes it.
    n_features_in_, feature_names_in_
        Columns of `fit`; names where they are text.

    Examples
    --------
    >>> from evercell import EvercellClassifier
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> cells, query = synthetic_cells(seed=1), synthetic_cells(50, seed=2)
    >>> classifier = EvercellClassifier(settings=quick_settings())
    >>> classifier = classifier.fit(cells, cells.obs["cell_type"], groups=cells.obs["donor"])
    >>> classifier.predict_proba(query).shape
    (50, 4)
    """

    def __init__(
        self,
        *,
        base: str | os.PathLike[str] | Annotator | None = None,
        settings: ModelSettings | None = None,
        update_settings: UpdateSettings | None = None,
        strategy: str = "canal",
        genes: Sequence[str] | None = None,
        values: str = "counts",
        species: str = "auto",
        reject: str | float | None = None,
        unknown_label: Any = UNKNOWN,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "auto",
        verbose: bool = False,
    ) -> None:
        self.base = base
        self.settings = settings
        self.update_settings = update_settings
        self.strategy = strategy
        self.genes = genes
        self.values = values
        self.species = species
        self.reject = reject
        self.unknown_label = unknown_label
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @classmethod
    def of(cls, model: Annotator | str | os.PathLike[str], **parameters: Any) -> EvercellClassifier:
        """A fitted classifier from a trained model: an `Annotator`, a name or a directory.

        Cells are matched by the names of their genes: give an AnnData, a DataFrame, or `genes`.
        """
        made = cls(**parameters)
        made.model_ = model if isinstance(model, Annotator) else load(model)
        made._classes_of = {name: name for name in made.model_.types.names}
        made._set_classes()
        return made

    _classes_of: dict[str, Any]  # what the model calls a type -> the label in y

    def fit(self, X: Cells, y: Any, groups: Any = None) -> EvercellClassifier:
        """Train a model.

        Parameters
        ----------
        X
            Cells (B, G). Cells without a count are left out.
        y
            Type of each cell (B,). Cells called "unknown", "unassigned" and the like are left out.
        groups
            Donor or batch of each cell (B,): whole groups are held out for calibration where there are three or more.
        """
        with _as_value_errors():
            cells = self._training_cells(X, y, groups, reset=True)
            base = load(self.base) if isinstance(self.base, str | os.PathLike) else self.base
            self.model_ = train(
                cells,
                LABELS,
                groups=None if groups is None else GROUPS,
                base=base,
                settings=self.settings,
                seed=self._seed(),
                species=self.species,
                device=self.device,
                shown=self.verbose or False,
            )
        self._set_classes()
        return self

    def partial_fit(self, X: Cells, y: Any, classes: Any = None, groups: Any = None) -> EvercellClassifier:
        """Teach the model a further data set, which may hold new types: a stage, not a batch of a few cells.

        Parameters
        ----------
        X, y, groups
            As for `fit`, which the first call is.
        classes
            Not needed, as types are added when they come; where given, `y` may hold no others.

        Raises
        ------
        GateError
            The update would have made the model worse at earlier types; the model is the old one.
        """
        if classes is not None and (others := np.setdiff1d(np.asarray(y), classes)).size:
            raise ValueError(f"y holds {others[:5].tolist()}, which are not in classes")
        if not hasattr(self, "model_"):
            return self.fit(X, y, groups)
        with _as_value_errors():
            cells = self._training_cells(X, y, groups, reset=False)
            self.model_ = update(
                self.model_,
                cells,
                LABELS,
                groups=None if groups is None else GROUPS,
                strategy=self.strategy,
                mapping={name: name for name in cells.obs[LABELS].unique()},  # labels mean what they say
                settings=self.update_settings,
                seed=self._seed(),
                species=self.species,
                device=self.device,
                shown=self.verbose or False,
            )
        self._set_classes()
        return self

    def predict(self, X: Cells) -> np.ndarray:
        """Type of each cell (B,), `unknown_label` where it is rejected."""
        found = self._annotated(X)
        types = np.asarray(found.types, dtype=object)
        codes = pd.Index(types).get_indexer(found.best_labels)
        labels = self.classes_[np.argsort(self._columns)[codes]]
        rejected = found.labels == UNKNOWN
        if not rejected.any():
            return np.asarray(labels)
        kind = np.result_type(labels, np.asarray(self.unknown_label))
        same = labels.dtype.kind == kind.kind
        return np.where(rejected, np.asarray(self.unknown_label, dtype=kind if same else object), labels)

    def predict_proba(self, X: Cells) -> np.ndarray:
        """Calibrated probability of each type (B, K), whether the cell is rejected or not."""
        found = self._annotated(X).probabilities[:, self._columns].astype(np.float64)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def predict_log_proba(self, X: Cells) -> np.ndarray:
        """Logarithm of `predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))

    def unknown_score(self, X: Cells) -> np.ndarray:
        """Score of each cell (B,), higher for cells of no known type."""
        found = self._annotated(X)
        return found.obs[f"{found.key}_unknown_score"].to_numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        return tags

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _annotated(self, X: Cells) -> Annotation:
        check_is_fitted(self, "model_")
        reject = "off" if self.reject is None else None if self.reject == "model" else self.reject
        with _as_value_errors():
            return annotate(
                self.model_,
                self._cells(X, reset=False),
                reject=reject,
                species=self.species,
                empty_cells="keep",
                device=self.device,
                shown=self.verbose or False,
            )

    def _training_cells(self, X: Cells, y: Any, groups: Any, *, reset: bool) -> AnnData:
        """Cells with labels and groups in ``obs``."""
        if y is None:
            raise ValueError("EvercellClassifier requires y to be passed, but the target y is None")
        cells = self._cells(X, reset=reset)
        if isinstance(getattr(y, "dtype", None), pd.CategoricalDtype):
            y = y.astype(object)
        y = column_or_1d(y, warn=True)
        if len(y) != cells.n_obs:
            raise ValueError(f"X has {cells.n_obs} cells, y {len(y)} labels: one a cell is needed")
        check_classification_targets(y)
        known: dict[str, Any] = {} if reset else dict(self._classes_of)
        for one in np.unique(y):
            if not is_unassigned(one) and known.setdefault(str(one).strip(), one) != one:
                raise ValueError(f"y holds two labels that read `{str(one).strip()}`")
        if reset and len(known) < 2:
            raise ValueError(f"y holds one class, {list(known.values())}: at least two cell types are needed")
        self._classes_of = known
        filled = np.ones(cells.n_obs, dtype=bool)
        if cells is not X:
            filled = np.asarray(cells.X.sum(axis=1)).ravel() > 0
        made = cells[filled].copy()
        made.obs = pd.DataFrame({LABELS: [str(one).strip() for one in y[filled]]}, index=made.obs_names)
        if groups is not None:
            made.obs[GROUPS] = [str(one) for one in np.asarray(groups)[filled]]
        return made

    def _cells(self, X: Cells, *, reset: bool) -> AnnData:
        """Cells as an AnnData of counts."""
        from anndata import AnnData

        if self.values not in ("counts", "expression"):
            raise SettingsError(f"values is `{self.values}`", hint="pass values='counts' or values='expression'")
        names = None
        if isinstance(X, AnnData):
            adata = X
            if reset:
                self.n_features_in_ = X.n_vars
                _check_feature_names(self, pd.DataFrame(columns=X.var_names), reset=True)
        else:
            names = X.columns.astype(str) if isinstance(X, pd.DataFrame) else self.genes
            how: dict[str, Any] = {"accept_sparse": "csr", "ensure_non_negative": True}
            if reset or hasattr(self, "n_features_in_"):
                checked = validate_data(self, X, reset=reset, **how)
            else:  # made `of` a model: matched by names
                checked = check_array(X, estimator=self, **how)
            if names is None:
                names = [f"feature{number}" for number in range(checked.shape[1])]
            if len(names) != checked.shape[1]:
                raise ValueError(f"genes has {len(names)} names, X {checked.shape[1]} columns")
            cells = pd.DataFrame(index=[f"cell{number}" for number in range(checked.shape[0])])
            adata = AnnData(sp.csr_matrix(checked), obs=cells, var=pd.DataFrame(index=pd.Index(names, dtype=object)))
        if self.values == "counts":
            return adata
        values = sp.csr_matrix(adata.X, dtype=np.float64)
        if reset:
            totals = np.asarray(values.sum(axis=1)).ravel()
            self.factor_ = TOTAL / np.median(totals[totals > 0]) if (totals > 0).any() else 1.0
        values.data = np.rint(values.data * self.factor_)
        return AnnData(values, obs=adata.obs[[]], var=adata.var)

    def _set_classes(self) -> None:
        self._classes_of = {name: self._classes_of[name] for name in self.model_.types.names}
        self.classes_ = np.sort(np.array(list(self._classes_of.values())))
        place = {one: code for code, one in enumerate(self._classes_of.values())}
        self._columns = np.array([place[one] for one in self.classes_.tolist()])


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """What is wrong with cells, genes, labels and settings, as the error that scikit-learn's callers expect."""
    try:
        yield
    except (CellsError, GenesError, LabelsError, SettingsError) as error:
        raise ValueError(str(error)) from error
