"""One process a folder: a lock that ends with its process, however that ends.

Not covered: file systems without locks, where nothing is held; machines that share a folder without shared locks.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from scope_opd.errors import RunFolderError


def hold(path: Path, what: str, expected: str) -> IO[str]:
    """Lock a file, made where it is missing, until the stream is closed or the process ends.

    Args:
        path: the lock file.
        what: is in use, for the complaint.
        expected: "one process a run".

    Raises:
        RunFolderError: another process holds it.
        OSError: it cannot be opened.
    """
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFolderError(f"{what} is in use by another process", expected, "wait for it or stop it") from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to
    return lock
