"""What of a working tree is sent to the cluster, and as what: one archive, the same bytes for the same files.

Left out are histories, environments, caches and results, and what .gitignore and .rayignore files name.
"""

from __future__ import annotations

import heapq
import os
import zipfile
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymodels.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

EXCLUDES = [
    ".git",
    ".venv",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    "/runs",
    "/registry",
    "/prepared",
    "/exports",
    "/benchmarks/results",
]
IGNORE_FILES = (".gitignore", ".rayignore")
MOST_BYTES = 100 * 2**20
"""What a Ray dashboard takes as one body; less than the 512 MiB that Ray then could store."""
ENTRY_BYTES = 256
"""At most what the archive needs for a file beside its name, twice, and content."""
NAMED = 5
FOLDER = "ps_d"
"""Where in a path the folder ends that one of pathspec's rules has matched."""
EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(working_dir: Path, target: Path, needed: Collection[str] = ()) -> int:
    """Write the files of a folder into a zip archive; its size in bytes.

    The same names, contents and modes make the same archive, so that a cluster that has it is not sent it again.

    Raises:
        ConfigError: it is no folder, has a file that cannot be read, ignores one that is needed, or is too large for a
            Ray cluster to take.
    """
    if not working_dir.is_dir():
        raise ConfigError(f"working_dir {working_dir} is not a folder")
    try:
        files = sorted(islice(tree_files(working_dir), MOST_BYTES // ENTRY_BYTES))  # so many are too large in any case
        if ignored := sorted({*needed} - {*files}):
            raise ConfigError(
                f"{', '.join(ignored)}: ignored in {working_dir}, and needed: see {' and '.join(IGNORE_FILES)}"
            )
        _check_size(working_dir, files)
        _write(working_dir, files, target)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}, which is to be sent: name it in .rayignore") from error
    return target.stat().st_size


def _write(working_dir: Path, files: list[str], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            path = working_dir / name
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (path.stat().st_mode & 0o777) << 16
            archive.writestr(entry, path.read_bytes())


def tree_files(root: Path) -> Iterator[str]:
    """The files to send, relative to ``root``, with / between folders. Links are followed, but never in a circle."""
    try:
        from pathspec import GitIgnoreSpec
    except ImportError as error:
        raise ClusterError(f"submitting needs pathspec: pip install 'raymodels[train]' ({error})") from error
    rules: list[tuple[str, GitIgnoreSpec]] = [("", GitIgnoreSpec.from_lines(EXCLUDES))]
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root).as_posix()
        prefix = "" if here == "." else f"{here}/"
        for name in IGNORE_FILES:
            if name in files:
                rules.append((prefix, GitIgnoreSpec.from_lines((Path(folder) / name).read_text().splitlines())))
        above = {os.path.realpath(root / part) for part in (Path(here), *Path(here).parents)}
        folders[:] = [
            name
            for name in sorted(folders)
            if not _ignored(f"{prefix}{name}/", rules) and os.path.realpath(Path(folder) / name) not in above
        ]
        for name in files:
            if (Path(folder) / name).is_file() and not _ignored(prefix + name, rules):
                yield prefix + name


def _ignored(name: str, rules: list[tuple[str, GitIgnoreSpec]]) -> bool:
    """The last rule that speaks of it decides, as in git: deeper folders' come later. The first always holds."""
    always, *said = [_said(spec, name[len(prefix) :]) for prefix, spec in rules if name.startswith(prefix)]
    return bool(always or next((ignored for ignored in reversed(said) if ignored is not None), False))


def _said(spec: GitIgnoreSpec, name: str) -> bool | None:
    """Whether rules ignore a path; none if they do not speak of it: to keep a folder says nothing of what is in it."""
    found = spec.check_file(name)
    if found.include is False and found.index is not None:
        match: Any = spec.patterns[found.index].match_file(name)
        folder = match.match.end(FOLDER) if FOLDER in match.match.re.groupindex else -1
        return False if folder in (-1, len(name)) else None
    return found.include


def _check_size(working_dir: Path, files: list[str]) -> None:
    sizes = {name: (working_dir / name).stat().st_size for name in files}
    total = sum(size + ENTRY_BYTES + 2 * len(name.encode()) for name, size in sizes.items())
    if total < MOST_BYTES:
        return
    biggest = heapq.nlargest(NAMED, sizes, key=lambda name: sizes[name])
    raise ConfigError(
        f"working_dir {working_dir} has {_mib(total)} to send in {len(files):,} files, and a Ray cluster takes at most "
        f"{_mib(MOST_BYTES)}; the biggest: {', '.join(f'{name} ({_mib(sizes[name])})' for name in biggest)}: "
        "name what the job does not need in .rayignore, and put data on a mount or into a bucket"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
