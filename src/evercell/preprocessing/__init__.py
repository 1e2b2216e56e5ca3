"""From counts to values for plots and clusters, kept with its settings for any later file: `preprocess`."""

from evercell.preprocessing.settings import PreprocessingSettings
from evercell.preprocessing.steps import KEY, Preprocessed, Preprocessing, preprocess

__all__ = ["KEY", "Preprocessed", "Preprocessing", "PreprocessingSettings", "preprocess"]
