"""How a command ends: the only place that catches errors, and turns them into an exit code."""

import errno
import signal
import sys
import traceback
from collections.abc import Callable

from yrunner.console import fail
from yrunner.errors import REPORT_A_BUG, YRunnerError

STOPPED = "stopped"

WHAT_TO_DO = {
    errno.ENOSPC: "Free some space on the disk; a run goes on from its last checkpoint by --resume",
    errno.EDQUOT: "Free some of your quota; a run goes on from its last checkpoint by --resume",
    errno.EACCES: "Set the permissions so that it can be read and written, or choose another place",
    errno.EPERM: "Set the permissions so that it can be written, or choose another place",
    errno.EROFS: "Choose a place that can be written, such as output=/another/folder",
    errno.ENOTDIR: "A file stands where a folder is needed; move it, or choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name or another place",
    errno.ELOOP: "A link stands where a file is needed; remove it, or choose another place",
    errno.EIO: "The disk or its connection fails; look at it before you run the command again",
}
"""Faults of the disk that a person can mend, wherever they happen."""


def run_to_exit(command: Callable[[], object]) -> None:
    """Run it; exit with 2 for what the user can mend, 3 for what is missing, 1 for a bug."""
    try:
        command()
    except YRunnerError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        fail(STOPPED)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader went away (`yrun schema | head`); that is no fault of anybody.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  the last place
        if isinstance(error, OSError) and error.errno in WHAT_TO_DO:
            fail(f"{error.filename or 'writing'}: {error.strerror}. {WHAT_TO_DO[error.errno]}")
            sys.exit(2)
        traceback.print_exc()
        fail(REPORT_A_BUG)
        sys.exit(1)
