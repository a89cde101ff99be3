"""One process at a time writes into an output folder.

The lock is the kernel's, on a small file in the folder: it goes when the process that has it goes, however
that ends, so no lock is ever left behind to be deleted by hand. The file tells who has it.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"


class InUse(ValueError):
    """Another process writes into the folder. The message says which."""


@contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Have `folder`, which is made where it is not there, for this process alone.

    Errors: InUse when another process has it. File systems without locks refuse nobody.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / LOCK_FILE, "a+") as file:  # closed, and so let go, by a crash as well
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUse(
                f"{folder} is in use by {file.read().strip() or 'another process'}; wait for it, stop it, or "
                "choose another out. Once it has ended, or died, the same command goes on where it stopped"
            ) from None
        except OSError:
            pass
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
