"""A repository on the Hub of the tests: commits of files, branches, pull requests."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple


class Blob(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:  # of git
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


class Commit(NamedTuple):
    files: dict[str, Blob]
    parent: str | None
    title: str


@dataclass
class Repo:
    owner: str
    private: bool = False
    sdk: str | None = None
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches by name, pull requests as refs/pr/N
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], title: str, parent: str | None) -> str:
        listing = [(path, blob.oid) for path, blob in sorted(files.items())]
        sha = hashlib.sha1(repr((parent, title, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(files, parent, title)
        self.refs[ref] = sha
        return sha

    @property
    def history(self) -> list[str]:
        """Titles of the commits on the main branch, newest first."""
        titles, sha = [], self.refs["main"]
        while sha is not None:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.commits[self.refs[ref]].files.items()}
