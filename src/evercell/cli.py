"""The command line: what is common to all commands, and how they end."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from evercell import __version__
from evercell.commands import (
    annotating,
    benching,
    checking,
    discovering,
    exchanging,
    explaining,
    merging,
    models,
    preprocessing,
    reconciling,
    registry,
    reporting,
    reproducing,
    serving,
    training,
    updating,
    validating,
)
from evercell.commands.console import Console
from evercell.distributed import started
from evercell.errors import EvercellError, GateError, MemoryWarning, SettingsError, class_and_words, words_of
from evercell.outputs import FULL, REFUSED
from evercell.progress import silenced

ANYWHERE = ("--quiet", "--verbose", "--debug")
THREADS = "--threads"
"""Options of all commands, which may stand before or after the command; `THREADS` has a value."""

OWN_THREADS = ("bench",)
"""Commands with such an option of their own."""

STORE = "pass --store FOLDER: counts are then kept in files there"
PARTS = "give an .h5ad and write an .h5ad or .csv: it is then read in parts; with --workers, give fewer"
LESS_MEMORY = {"train": STORE, "update": STORE, "pretrain": STORE, "annotate": PARTS}
"""What a command can do where memory is short."""

SHARED = ("train", "pretrain")
"""Commands that processes started by torchrun share."""

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a check failed (verify, reproduce, doctor --strict), or old types fell in an update
  2    wrong input or wrong use; what mends it is said on standard error
  3    an error that evercell did not foresee
  130  stopped from the keyboard

\b
--quiet, --verbose, --debug and --threads N may stand before or after the command.

\b
Examples:
  evercell demo
  evercell train labelled.h5ad --labels cell_type --donor donor --output model
  evercell annotate query.h5ad --model model --output annotated.h5ad --report report.html"""

app = typer.Typer(
    name="evercell",
    help="Label the cells of single-cell RNA-seq data with a model that keeps learning.",
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
)
for module in (
    merging,
    preprocessing,
    training,
    reconciling,
    updating,
    validating,
    annotating,
    explaining,
    reporting,
    discovering,
    serving,
    models,
    exchanging,
    reproducing,
    checking,
    benching,
):
    for command, epilog in module.COMMANDS.items():
        app.command(epilog=epilog)(command)
app.add_typer(registry.app)
app.add_typer(exchanging.app)


def _version(asked: bool) -> None:
    if asked:
        print(f"evercell {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only results, warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print details.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(THREADS, metavar="N", min=1, help="Threads of the CPU to use; results do not depend on it."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Docstring-less on purpose: the help text of the program is that of `app`.
    context.obj = Console(quiet=quiet, verbose=verbose)
    warnings.simplefilter("default" if debug else "ignore")  # of the libraries: nothing a user can act on
    warnings.simplefilter("once", MemoryWarning)
    warnings.showwarning = _shown_by(context.obj)
    if context.invoked_subcommand not in (None, *SHARED) and started().size > 1:
        raise SettingsError(
            f"`{context.invoked_subcommand}` runs in one process; torchrun started {started().size}",
            hint=f"leave out torchrun; {' and '.join(SHARED)} share their work among processes",
        )
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif threads is not None:
        from evercell.threads import limited

        context.with_resource(limited(threads))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    arguments
        Words of the command line; those of the process if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    common = [word for word in ANYWHERE if word in options]
    rest = [word for place, word in enumerate(given) if place >= len(options) or word not in ANYWHERE]
    place = next((i for i, word in enumerate(rest) if word.split("=")[0] == THREADS), None)
    if place is not None and "--" not in rest[:place] and rest[0] not in OWN_THREADS:
        end = place + (1 if "=" in rest[place] else 2)
        common, rest = [*common, *rest[place:end]], [*rest[:place], *rest[end:]]
    console = Console(quiet="--quiet" in common)
    try:
        with warnings.catch_warnings(), silenced(console.quiet or started().rank > 0):
            code = app([*common, *rest], prog_name="evercell", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except Exception as error:
        if "--debug" in common:
            traceback.print_exc()
        return _failed(error, console, next((word for word in rest if word[:1] != "-"), ""))
    if code == 130:
        console.note("stopped")
    return code if isinstance(code, int) else 0


def _shown_by(console: Console) -> Callable[..., None]:
    """How warnings are shown: ours as all that a command says."""
    libraries = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
        if issubclass(category, MemoryWarning):
            console.warning(str(message))
        else:
            libraries(message, category, *where, **how)

    return show


def _failed(error: Exception, console: Console, command: str) -> int:
    """Say what went wrong in a line and how to mend it; returns the exit code."""
    if isinstance(error, EvercellError):
        console.error(error.message, error.hint)
        return 1 if isinstance(error, GateError) else 2
    if hasattr(error, "format_message"):  # wrong use, found by the parser
        where = getattr(getattr(error, "ctx", None), "command_path", "evercell")
        console.error(error.format_message(), f"`{where} --help` shows how it is used")
        return 2
    what = words_of(error)
    if "OutOfMemory" in type(error).__name__:
        console.error(f"the memory of the GPU ran out: {what}", "pass --device cpu, or give fewer cells at a time")
        return 2
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in what:
        mend = LESS_MEMORY.get(command, "give fewer cells at a time")
        console.error(
            f"memory ran out: {what}".removesuffix(": MemoryError"), f"{mend}, or use a machine with more memory"
        )
        return 2
    if isinstance(error, OSError) and error.errno in (*FULL, *REFUSED):
        console.error(what, "choose another folder, or make room in this one")
        return 2
    console.error(class_and_words(error), "this is a bug: run it again with --debug and report what it says")
    return 3
