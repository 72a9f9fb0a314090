"""Runs a command to its end, and ends all of it when whoever started it is gone.

Started as a script, `python -I -S supervisor.py COMMAND...`, with a pipe for standard input that
closes when its starter dies. SIGTERM is passed on. Whatever the command has left running is killed
before this exits, with the command's own exit code, or 128 and the signal that killed it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans of the command become children of this process."""


def descendants() -> list[int]:
    """Processes below this one, by /proc; none where there is no /proc."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(name)] = int(fields[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def kill_all(command: "subprocess.Popen[bytes]") -> None:
    """Kill the command, and all that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(command.pid, signal.SIGKILL)
    for _ in range(100):
        left = descendants()
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return


def main() -> int:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SUBREAPER, 1)
    try:
        command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 127
    wake, bell = os.pipe()
    os.set_blocking(bell, False)
    signal.set_wakeup_fd(bell)

    def pass_on(signum: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(command.pid, signum)

    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, pass_on)
    while command.poll() is None:
        ready, _, _ = select.select([0, wake], [], [], 1.0)
        if wake in ready:
            os.read(wake, 100)
        if 0 in ready and not os.read(0, 1):
            break  # the starter is gone
    code = command.poll()
    kill_all(command)
    return 137 if code is None else 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
