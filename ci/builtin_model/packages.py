"""Packages that sources.yaml names: downloaded with the registries' own clients, and unpacked."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

DROPPED = (
    "*genindex*", "*py-modindex*", "*/search.html*", "*/_modules/*", "*/_sources/*", "*/_static/*",
    "*changelog*", "*changes*", "*[Cc]hange[Ll]og*", "*CHANGE*", "*release_notes*",
    "*releasenotes*", "*/whatsnew/*", "*relnotes*", "*history.html", "*authors.html",
    "*license*.html", "*LICENSE*", "*/index-all.html", "*_source.html",
)  # fmt: skip


class Missing(Exception):
    """A sentence: which package is not there, and what to do."""


@dataclass(frozen=True)
class Source:
    """One package of sources.yaml. `registry`: debian, pypi (the wheel) or pypi-source. `take` and
    `drop` are globs on paths inside the package (`*` also crosses folders); `cap_mb` limits its
    text."""

    name: str
    registry: str
    version: str
    licence: str
    format: str
    take: Sequence[str]
    drop: Sequence[str] = ()
    cap_mb: float = 25.0


def fetch(source: Source, cache: Path) -> Path:
    """Folder with the package's files, downloaded unless `cache` has it."""
    folder = cache / "files" / f"{source.name}-{source.version.replace(':', '.')}"
    if folder.is_dir():
        return folder
    archives = cache / "archives" / source.name
    archives.mkdir(parents=True, exist_ok=True)
    if source.registry == "debian":
        command = ["apt-get", "download", f"{source.name}={source.version}"]
    else:
        kind = "--only-binary" if source.registry == "pypi" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [kind, source.name, f"{source.name}=={source.version}"]
    done = subprocess.run(command, cwd=archives, capture_output=True, text=True, check=False)
    found = sorted(archives.iterdir())
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        raise Missing(
            f"{source.registry} does not give {source.name} {source.version} ({reason}); name a "
            "version that it has in sources.yaml"
        )
    made = folder.with_name(folder.name + ".part")
    made.mkdir(parents=True, exist_ok=True)
    _unpack(found[0], made)
    os.replace(made, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if name.endswith((".py", ".json.gz"))]
            wheel.extractall(folder, names)
    else:
        with tarfile.open(archive) as source:
            members = [each for each in source if each.name.endswith((".rst", ".md", ".txt"))]
            source.extractall(folder, members, filter="data")


def files(source: Source, folder: Path) -> list[Path]:
    """What `take` names and `drop` does not, in order of path; links count once."""
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        taken = any(fnmatch(inside, glob) for glob in source.take)
        dropped = any(fnmatch("/" + inside, glob) for glob in (*DROPPED, *source.drop))
        if taken and not dropped and path.is_file() and not path.is_symlink():
            found.setdefault(path.stat().st_ino, path)
    return list(found.values())


def read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data
