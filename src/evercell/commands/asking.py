"""What is asked of a new model on the command line: its parts, a preset, how it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from evercell.commands.console import Console
from evercell.commands.models import load_model
from evercell.errors import SettingsError

if TYPE_CHECKING:
    from evercell.annotator import Annotator
    from evercell.finetuning import ModelSettings
    from evercell.presets import Preset
    from evercell.pretraining import PretrainingSettings
    from evercell.updating import UpdateSettings

Settings = TypeVar("Settings", "ModelSettings", "PretrainingSettings")
AnySettings = TypeVar("AnySettings", "ModelSettings", "UpdateSettings")
Base = Annotated[
    str | None, typer.Option("--from", metavar="MODEL", help="Start from the genes and the backbone of this model.")
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="canal|scbert|transanno",
        help="The hyper-parameters of a published system; other options still count.",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        "--balance",
        metavar="NAME",
        help="How rare types are helped: sqrt (default), oversample, weights or none. Training cells only.",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", metavar="N", help="Training cells drawn in all, with repeats.")
]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", metavar="NAME", help="values (default) or bins.")]
Backbone = Annotated[
    str | None, typer.Option("--backbone", metavar="NAME", help="latent (default), performer or transformer.")
]
BackboneSetting = Annotated[
    list[str] | None,
    typer.Option("--backbone-setting", metavar="NAME=N", help="Size of the backbone, such as depth=1. Repeatable."),
]
Donor = Annotated[
    str | None, typer.Option("--donor", metavar="KEY", help="Column of obs with donors: whole donors are held out.")
]
Batch = Annotated[
    str | None, typer.Option("--batch", metavar="KEY", help="Column of obs with batches, where donors are not known.")
]
Finetune = Annotated[
    str | None,
    typer.Option(
        "--finetune",
        metavar="auto|all|last|head",
        help="With --from, what is trained: all weights; the last block and the head; or, in seconds, the head. auto "
        "(default): the head where a type has fewer than 50 labelled cells in the mean.",
    ),
]


def asked_preset(name: str | None, console: Console) -> Preset | None:
    """The preset of that name, with a word about what is not as in the paper; None for None."""
    if name is None:
        return None
    from evercell.presets import preset

    found = preset(name)
    console.note(f"settings of {found.source}; not as there:")
    for one in found.differs:
        console.note(f"  {one}")
    return found


def given_over(settings: AnySettings, **options: Any) -> AnySettings:
    """Settings with the options that were given; those that are None keep what the settings say."""
    return replace(settings, **{name: one for name, one in options.items() if one is not None})


def in_batches(settings: Settings, batches: int | None) -> Settings:
    """Settings with steps of so many batches; as they are for None."""
    if batches is None:
        return settings
    return replace(settings, training=replace(settings.training, batches_a_step=batches))


def model_settings(
    asked: Asked, base: Annotator | None, published: Preset | None, n_cells: int, **options: Any
) -> ModelSettings:
    """Settings of a first model of `n_cells` cells: of the preset or by default, with what was asked for over them."""
    from evercell.finetuning import settings_for

    settings = settings_for(base)
    if published is not None:
        settings = published.over(n_cells).model
        if base is None:  # a new backbone has no layer that could be left as it is
            settings = replace(settings, finetune="all")
    settings = given_over(asked.over(settings), **options)
    if asked.samples is not None and settings.finetune == "auto":
        settings = replace(settings, finetune="all")  # a head alone draws no samples
    return settings


def check_asked(asked: Asked, published: Preset | None, *, finetune: str | None, balance: str | None) -> None:
    """Whether the names are there, said before a file or a model is read."""
    from evercell.finetuning import ModelSettings
    from evercell.training_cells import check_balance

    if asked.base is None and finetune not in (None, "auto", "all"):
        raise SettingsError(f"--finetune {finetune} needs a pretrained model", hint="name one with --from")
    asked.over(ModelSettings() if published is None else published.model)
    if balance is not None:
        check_balance(balance)


@dataclass(frozen=True)
class Asked:
    """What was asked for of a new model; everything else keeps its default."""

    base: str | None
    tokenizer: str | None
    backbone: str | None
    backbone_settings: tuple[str, ...]
    samples: int | None

    def over(self, settings: Settings) -> Settings:
        """Settings with what was asked for. Names are checked here, before any file is read."""
        from evercell.backbones import BACKBONES
        from evercell.tokenizers import TOKENIZERS

        parts = {
            "--tokenizer": self.tokenizer,
            "--backbone": self.backbone,
            "--backbone-setting": self.backbone_settings or None,
        }
        if self.base is not None and (named := [option for option, one in parts.items() if one is not None]):
            raise SettingsError(
                f"{named[0]} cannot be chosen: it comes with the model `{self.base}`",
                hint=f"leave out {named[0]} or --from",
            )
        if self.samples is not None:
            settings = replace(settings, training=replace(settings.training, samples=self.samples))
        if self.tokenizer is not None:
            settings = replace(settings, tokenizer=TOKENIZERS[self.tokenizer].name)
        backbone = BACKBONES[self.backbone or settings.backbone]
        known = list(inspect.signature(backbone).parameters)
        chosen = dict(_number(word, known[1:], backbone.name) for word in self.backbone_settings)
        return replace(settings, backbone=backbone.name, backbone_settings={**settings.backbone_settings, **chosen})

    def model(self, console: Console) -> Annotator | None:
        """The model to start from."""
        return None if self.base is None else load_model(self.base, console)


def weighed(settings: PretrainingSettings, words: Sequence[str]) -> PretrainingSettings:
    """Settings with the weights of terms that ``TERM=W`` say."""
    fields = {"masked": "masked", "contrast": "contrast", "types": "supervised"}
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in fields:
            raise SettingsError(f"--weight is `{word}`", hint=f"name one of: {', '.join(fields)}")
        try:
            found[fields[name]] = float(value)
        except ValueError:
            raise SettingsError(f"--weight is `{word}`", hint=f"write a number, such as {name}=0.5") from None
    return replace(settings, **found)


def _number(word: str, known: Sequence[str], backbone: str) -> tuple[str, int]:
    """Name and value of ``NAME=N``."""
    name, _, value = word.partition("=")
    settings = ", ".join(one for one in known if one != "n_bins")
    if name not in known or name == "n_bins":
        raise SettingsError(f"the backbone `{backbone}` has no setting `{name}`", hint=f"it has: {settings}")
    if not value.isdecimal() or int(value) < 1:
        raise SettingsError(f"--backbone-setting is `{word}`", hint=f"write a whole number, such as {name}=8")
    return name, int(value)
