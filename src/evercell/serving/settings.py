"""What a server is asked for."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from evercell import registry
from evercell.errors import ModelError, SettingsError

SUFFIXES = (".h5ad", ".h5", ".hdf5", ".loom", ".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
LEAST_TOKEN = 16
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerSettings(BaseModel):
    """Settings of a server.

    Parameters
    ----------
    host, port
        Where it listens.
    token
        What users must know; needed where `host` is not this machine alone.
    hosts
        Further names under which browsers may ask for it.
    models
        Folder of the models on offer besides those that come with evercell, and of those that users teach; by default
        that of the user's own models.
    max_upload
        Bytes of the largest file.
    jobs
        Jobs that run at a time; each has a process of its own.
    kept
        Jobs kept at a time, those that wait and those that are done.
    keep_seconds
        Time after which a job that has ended is removed, with its files.
    job_seconds
        Time after which a running job is ended.
    patience
        Seconds that an upload, or a request's header, may send nothing; after these an upload must keep `least_rate`.
    least_rate
        Bytes a second.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8501, ge=0, le=65535)
    token: str | None = None
    hosts: tuple[str, ...] = ()
    models: Path | None = None
    max_upload: int = Field(default=2 << 30, gt=0)
    jobs: int = Field(default=2, ge=1, le=64)
    kept: int = Field(default=200, ge=1)
    keep_seconds: float = Field(default=4 * 3600, gt=0)
    job_seconds: float = Field(default=4 * 3600, gt=0)
    patience: float = Field(default=20, gt=0)
    least_rate: int = Field(default=4096, ge=0)

    @property
    def folder(self) -> Path:
        """Folder of the server's own models; it may not be there yet."""
        return registry.own_folder() if self.models is None else self.models

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    def checked(self) -> ServerSettings:
        """The settings, with a token where one is needed.

        Raises
        ------
        SettingsError
            If the token is so short that it can be guessed.
        """
        if self.token is None and not self.local:
            return self.model_copy(update={"token": secrets.token_urlsafe(24)})
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii()):
            raise SettingsError(
                f"the token has {len(self.token)} characters; {LEAST_TOKEN} or more plain ones are needed",
                hint="leave out --token where --host is not this machine: one is made and printed",
            )
        return self

    def allows(self, host: str) -> bool:
        """Whether browsers may call the server by this name (without port).

        A page of somebody else whose name was made to lead here would be of the same origin as this one; its name is
        refused. An address cannot be such a name.
        """
        name = host.lower().rstrip(".")
        if name in (*LOOPBACK, *(one.lower() for one in self.hosts)):
            return True
        if self.local:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return True

    def listed_models(self) -> dict[str, registry.ListedModel]:
        """The models on offer by name: the server's own, then the packaged ones; only those with cell types."""
        found: dict[str, registry.ListedModel] = {}
        for folder in (registry.PACKAGED, self.folder):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if NAME.fullmatch(path.name) and (path / "annotator.json").is_file():
                    found[path.name] = registry.describe(path)
        return {name: one for name, one in sorted(found.items()) if one.n_types and not one.problem}

    def model(self, name: str) -> registry.ListedModel:
        """A model on offer.

        Raises
        ------
        ModelError
            If there is none of this name.
        """
        listed = self.listed_models()
        if name not in listed:
            raise ModelError(
                f"there is no model `{name}`", hint=f"choose {registry.AUTO} or one of: {', '.join(listed)}"
            )
        return listed[name]

    def free_name(self, name: str) -> Path:
        """Where a new model of this name is written.

        Raises
        ------
        ModelError
            If it cannot be a name, or is that of a model that is there.
        """
        if not NAME.fullmatch(name) or name == registry.AUTO:
            raise ModelError(
                f"`{name}` cannot be the name of a model",
                hint="use letters, digits, `_`, and, but not first, `-` and `.`; 64 at most",
            )
        if (self.folder / name).exists() or (registry.PACKAGED / name).exists():
            raise ModelError(f"there is a model `{name}` already", hint="choose another name")
        return self.folder / name
