"""Becomes the case: sets its limits, then replaces itself by the command. Imports nothing slow.

Arguments: the sweep's process id, the bytes of memory for each process or 0, then the command.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _main() -> None:
    parent, n_bytes, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        # A sweep that is killed leaves no case behind: the other ranks end when this process does.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            sys.exit(1)
        # The kernel, out of memory, ends the case and not the sweep or the user's shell.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    if n_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    os.execv(command[0], command)


_main()
