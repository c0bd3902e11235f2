"""A lock on a folder or a file, which the system takes from a process that died."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Lock:
    """A lock that is held until `release`, or until the process ends."""

    path: Path
    opened: int | None

    def release(self) -> None:
        """Gives it free; a second time does nothing."""
        if self.opened is not None:
            os.close(self.opened)
            self.opened = None


def take_lock(path: Path) -> Lock:
    """Locks a file, which is made where it is missing and stays: removing it would let two processes lock two files.

    On a file system without locks nothing is locked.

    Raises:
      BlockingIOError: it is locked already, with the number of the process that did.
    """
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(opened, 20, 0).decode(errors="replace")
        os.close(opened)
        ours = owner == str(os.getpid())
        who = "this process; close what holds it first" if ours else f"the process {owner}; take another folder"
        raise BlockingIOError(f"{path.parent} is used already by {who}") from error
    except OSError:
        return Lock(path, opened)
    os.ftruncate(opened, 0)
    os.pwrite(opened, str(os.getpid()).encode(), 0)
    return Lock(path, opened)
