"""A run that another program isolates: what such a wrapper needs, on either side of it.

`main()` is called in the new interpreter inside, in place of `start.main`; `sandlock()` is the
program that isolates with sandlock. Nothing is written.
"""

from __future__ import annotations

import _signal
import json
import os
import resource
import select
import stat
import struct
import sys
from typing import Any, NoReturn

from . import confine, kernel, start

STATUS, TROUBLE = 5, 6  # descriptors beside those of `start`, which no program sees
ENDED = struct.Struct("idq")  # wait status, CPU seconds, peak bytes
_FOR_PROGRAM = (0, start.REPORT, start.TASK, STATUS, TROUBLE)  # 1 and 2 every wrapper passes on
_HIGH = 200
_REAP_MILLISECONDS = 50


def main() -> NoReturn:
    """First call of an interpreter that a wrapper started."""
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        _receive_descriptors()
    with os.fdopen(start.TASK, "rb") as file:
        order, task, site = json.loads(file.read())
    init = os.getpid()
    program = os.fork()
    if program:
        _be_init(program)
    _confine(order, init)
    start.run(task, site)


def _confine(order: dict[str, Any], init: int) -> None:
    try:
        os.close(STATUS)
        os.setsid()
        kernel.die_with_parent(init)
        confine.confine(confine.Order(**order))
    except BaseException as error:
        os.write(TROUBLE, f"{type(error).__name__}: {error}".encode()[:4096])
        os._exit(125)
    os.close(TROUBLE)


def _be_init(program: int) -> NoReturn:
    """Say how the program ended; end, and it with us, when nobody is left who would hear it."""
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # no handler: nobody can send it to process 1
    os.closerange(0, STATUS)
    os.close(TROUBLE)
    poller = select.poll()
    poller.register(os.pidfd_open(program), select.POLLIN)
    poller.register(STATUS, 0)
    while True:
        if STATUS in dict(poller.poll(_REAP_MILLISECONDS)):
            os._exit(1)
        while (ended := os.wait4(-1, os.WNOHANG))[0]:  # orphans, too, where this is process 1
            if ended[0] == program:
                _, status, usage = ended
                total = resource.getrusage(resource.RUSAGE_CHILDREN)
                seconds = total.ru_utime + total.ru_stime
                os.write(STATUS, ENDED.pack(status, seconds, usage.ru_maxrss * 1024))
                os._exit(0)


def sandlock() -> NoReturn:
    """Run the command `argv[3:]` in sandlock: `argv[1]` says in JSON with what, `argv[2]` where.

    Sandlock closes all descriptors but three: the others travel through a socket in 0's place.
    """
    import socket

    settings, work, command = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
    sys.path.insert(0, settings["folder"])
    from sandlock import Sandbox  # type: ignore[import-not-found]

    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"0"], _FOR_PROGRAM)
    os.dup2(theirs.fileno(), 0)
    os.closerange(start.REPORT, TROUBLE + 1)  # whoever reads there waits for the last of them
    sandbox = Sandbox(
        fs_readable=settings["readable"], fs_writable=[work, *settings["devices"]], cwd=work
    )
    os._exit(sandbox.run_interactive(command) & 0xFF)


def _receive_descriptors() -> None:
    """Take what waits in the socket at 0, and put it where it belongs."""
    import _socket  # without Python's `socket`, whose import takes longer than all of this

    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, 0)
    size = _socket.CMSG_SPACE(4 * len(_FOR_PROGRAM))
    _, [(_, _, raw)], _, _ = channel.recvmsg(1, size)
    channel.close()
    found = struct.unpack(f"{len(_FOR_PROGRAM)}i", raw)
    high = [os.dup2(descriptor, _HIGH + i) for i, descriptor in enumerate(found)]
    os.closerange(TROUBLE + 1, _HIGH)
    for descriptor, place in zip(high, _FOR_PROGRAM, strict=True):
        os.dup2(descriptor, place, inheritable=place == 0)
    os.closerange(_HIGH, _HIGH + len(high))
