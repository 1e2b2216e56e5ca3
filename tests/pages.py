"""README and documentation as programs: the code blocks of a page, run in their order in a folder of its own.

A block is a fence, or an indented block of commands. Fences of ``text`` are no code. A block that cannot run here says
why, in a line before it that no reader sees::

    <!-- not run: needs two GPUs -->

What it holds is still looked at: commands have to parse, Python to compile, scripts to be there. The same goes for
lines of ``pip install`` in any block: the extras that they name have to exist. ``python tests/pages.py`` lists all that
is not run.

In its folder a page finds `labelled.h5ad`, `atlas.h5ad`, `new.h5ad`, `query.h5ad` (packaged studies), `atlas` (a folder
of one) and `model` (of the demo).
Trainings draw few cells, whatever a page says.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from made_once import command_line

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

MARK = re.compile(r"<!--\s*not run: (?P<reason>[^>]{10,}?)\s*-->\s*")
NO_CODE = re.compile(r"text|\{.*")  # what is printed, formats; directives of MyST
FILE = re.compile(r"# file: (?P<name>[\w.]+)\n")
NESTED = re.compile(r"\$\(evercell ([^()]*)\)")

SHORT: dict[str, list[str]] = {
    "train": ["--no-refit", "--overwrite"],
    "update": ["--no-refit"],
    "explain": ["--max-cells", "3"],
    "bench": ["--seconds", "1"],
    "crossval": ["--folds", "2"],
    "compare": ["--folds", "2"],
}
"""Options that are added to a command, to save time."""

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Block:
    """A code block: where it stands, its language, its code, and why it is not run (None where it is)."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Commands of a block for the shell, continued lines joined, without comments."""
        bare = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in self.code.replace("\\\n", " ").splitlines())
        return [line.removeprefix("$ ") for line in bare if line]


def blocks(name: str) -> list[Block]:
    """Code blocks of a page, in order."""
    from markdown_it import MarkdownIt

    found: list[Block] = []
    reason: str | None = None
    for token in MarkdownIt().parse(PAGES[name].read_text(encoding="utf-8")):
        if token.type == "html_block":
            mark = MARK.fullmatch(token.content)
            assert mark or "not run" not in token.content, f"{name}: `{token.content.strip()}` gives no reason"
            reason = mark["reason"] if mark else None
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1
            language = token.info.strip().split(" ")[0] if token.type == "fence" else "bash"
            assert language, f"{name}:{line}: a fence without a language; `text` is one"
            if not NO_CODE.fullmatch(language):
                found.append(Block(name, line, language, token.content, reason))
            reason = None
        elif token.nesting == 1 or token.type == "heading_open":
            reason = None
    return found


def check_parses(line: str) -> None:
    """Check that a command of evercell is one, with its options."""
    words = shlex.split(NESTED.sub("there", line))
    command, words = command_line(), words[words.index("evercell") + 1 :]
    words = [word for word in words if word not in ("--quiet", "--verbose", "--debug")]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no such command: {line}"
        command, words = command.commands[words[0]], words[1:]
    if not hasattr(command, "commands") and "--help" not in words:
        try:
            command.make_context(line, words, resilient_parsing=False).close()
        except Exception as error:  # the parser has many
            raise AssertionError(f"{line}: {error}") from error


def check_unrun(block: Block) -> None:
    """Check what can be checked of a block that is not run."""
    if block.language == "python":
        compile(block.code, block.where, "exec")
    if block.language != "bash":
        return
    for line in block.commands:
        if re.match(r"(?:\w+=\S+ )*(?:torchrun .* -m )?evercell ", line):
            check_parses(line.split(" | ")[0].split(" > ")[0])
        for script in re.findall(r"\b(?:benchmarks|runs)/\w+\.(?:py|sh)", line):
            assert (ROOT / script).is_file(), f"{block.where}: there is no {script}"
        check_installs(line)


def check_installs(line: str) -> bool:
    """Whether a line installs something; then its extras have to exist."""
    for extras in re.findall(r"(?:\.|evercell)\[([\w,]+)\]", line):
        for extra in extras.split(","):
            assert extra in EXTRAS, f"there is no extra `{extra}`: {line}"
    return bool(re.match(r"(python -m )?pip install ", line))


@dataclass
class Reader:
    """Somebody who types what a page says, in the current folder.

    `ready` are folders that commands have made before: command to the copies to be made. `said` is what was printed, by
    command; `names` are those of the page's Python.
    """

    run: Run
    ready: dict[str, dict[Path, str]]
    said: dict[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)

    def reads(self, page: str) -> None:
        """Run the blocks of a page in their order."""
        for block in blocks(page):
            if block.reason is not None:
                check_unrun(block)
            elif block.language == "python":
                self._python(block)
            else:
                assert block.language in ("bash", "console"), f"{block.where}: no test runs {block.language}"
                for line in block.commands:
                    self._types(line, block.where)

    def _python(self, block: Block) -> None:
        if file := FILE.match(block.code):
            Path(file["name"]).write_text(block.code, encoding="utf-8")
        else:
            exec(compile("\n" * block.line + block.code, block.page, "exec"), self.names)  # noqa: S102 -- the page's own

    def _types(self, line: str, where: str) -> None:
        if check_installs(line):
            return
        if folder := re.fullmatch(r"mkdir (\w+)", line):
            Path(folder[1]).mkdir()
            return
        assert line.startswith("evercell "), f"{where}: no test runs `{line}`; say so and why: <!-- not run: ... -->"
        if line in self.ready:
            for source, target in self.ready[line].items():
                shutil.copytree(source, target, dirs_exist_ok=True)
            return
        words = shlex.split(NESTED.sub(lambda inner: self._called(shlex.split(inner[1]), where).strip(), line))[1:]
        self.said[line] = self._called([*words, *SHORT.get(words[0], [])], where)

    def _called(self, words: list[str], where: str) -> str:
        code, out, err = self.run(*words)
        assert code == 0, f"{where}: evercell {shlex.join(words)}\n{out}\n{err}"
        return out


if __name__ == "__main__":
    every = [block for page in PAGES for block in blocks(page)]
    unrun = [block for block in every if block.reason is not None]
    for block in unrun:
        print(f"{block.where}: {block.reason}")
    print(f"{len(unrun)} of {len(every)} blocks are not run")
