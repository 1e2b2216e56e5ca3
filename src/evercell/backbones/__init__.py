"""Backbones: tokens of a cell -> its representation.

To add one: a new file here with a subclass of `Backbone`, and its line in `BACKBONES`.
"""

from evercell.backbones.base import Backbone
from evercell.plugins import Registry

BACKBONES: Registry[Backbone] = Registry(
    "backbone",
    {
        "latent": "evercell.backbones.latent:LatentBackbone",
        "performer": "evercell.backbones.performer:PerformerBackbone",
        "transformer": "evercell.backbones.transformer:TransformerBackbone",
    },
)

__all__ = ["BACKBONES", "Backbone"]
