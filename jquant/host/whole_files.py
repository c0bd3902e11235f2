"""Files that are written whole or not at all."""

import errno
import fcntl
import itertools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST = 200  # bytes of the target's name in that of its temporary file; the rest of the 255 is for the numbers
_count = itertools.count()
_unfinished: set[Path] = set()  # temporary files that this process writes to


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `path` at the end, and goes away if there is an error.

    What is written is on disk before it gets its name. It has the mode of the file that it replaces, or that of the
    umask. A symbolic link stays, and the file behind it is replaced. What is neither a file nor missing, such as
    `/dev/stdout`, is written as it is. A process that was killed leaves `.NAME.PID-COUNT.partial`, which the next save
    of the same file removes.

    Raises:
      OSError: what the system says, with the path that was asked for. FileNotFoundError: no folder for it.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} to; make it first")
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{_short(target.name)}.{os.getpid()}-{next(_count)}.partial")
    try:
        if _is_written_in_place(target):
            yield target
            return
        with _made(partial, target):
            yield partial
            _finish(partial, target)
    except OSError as error:
        if _names_another(error, partial, target):
            raise
        raise _named(error, path) from error


def write_figure(path: str | os.PathLike[str], figure: Any, *, dpi: int) -> None:
    """A figure of matplotlib, in the format of the suffix; without one as `path.png`. The folder is made if need be."""
    path = Path(path) if Path(path).suffix else Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix("."))


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST])


def _is_written_in_place(target: Path) -> bool:
    """Whether the target is a device or a pipe.

    Raises:
      OSError: a folder, or a link that leads nowhere.
    """
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if target.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    return target.exists() and not target.is_file()


@contextmanager
def _made(partial: Path, target: Path) -> Iterator[None]:
    """The temporary file, empty and locked, so that no other process takes it for one that was left behind."""
    _remove_left_behind(target)
    mode = 0o600 if target.exists() else 0o666  # no reader before the file has the mode of the one it replaces
    opened = None
    try:  # from here on, since an interrupt may come behind any step
        _unfinished.add(partial)
        opened = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, mode)
        with suppress(OSError):  # a file system without locks: nothing is taken for left behind there either
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if opened is not None:
            os.close(opened)
        partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


def remove_unfinished() -> None:
    """Removes the temporary files of this process, which is about to end in the middle of its work."""
    for partial in tuple(_unfinished):
        with suppress(OSError):
            partial.unlink()


def _remove_left_behind(target: Path) -> None:
    """Removes the temporary files of this target that no process writes to any more."""
    name = re.compile(rf"\.{re.escape(_short(target.name))}\.\d+-\d+\.partial")
    with suppress(OSError):  # a folder that cannot be listed
        for found in filter(name.fullmatch, os.listdir(target.parent)):
            with suppress(OSError):  # locked, somebody else's, or gone already
                _remove_unlocked(target.with_name(found))


def _remove_unlocked(partial: Path) -> None:
    opened = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()
    finally:
        os.close(opened)


def _finish(partial: Path, target: Path) -> None:
    """Writes the temporary file to disk, and gives it mode and name of the target."""
    _sync(partial, os.O_RDONLY)
    if target.exists():
        os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
    os.replace(partial, target)
    with suppress(OSError):  # the file is there; some file systems sync no folder
        _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    opened = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _names_another(error: OSError, partial: Path, target: Path) -> bool:
    names = {str(name) for name in (error.filename, error.filename2) if name is not None}
    return bool(names) and not names & {str(partial), str(target)}


def _named(error: OSError, path: Path) -> OSError:
    """The error with the path that was asked for."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return OSError(error.errno, error.strerror, str(path))
