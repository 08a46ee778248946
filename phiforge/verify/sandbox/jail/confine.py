"""What a process does to itself before it runs foreign code: limits, then locks.

`confine(order)` binds the calling process, and all that it starts, for good.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

from . import kernel, landlock, seccomp

_NUM_OPEN_FILES = 64


@dataclass(frozen=True)
class Order:
    """What to do to oneself; the limits are those of the client's `Limits`."""

    cpu_seconds: int
    memory_bytes: int
    disk_bytes: int
    num_processes: int  # 0: no bound of our own
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    devices: tuple[str, ...]
    machine: str
    use_landlock: bool
    use_seccomp: bool
    processes: bool  # whether new processes are allowed
    metadata: bool  # whether modes and times of files may be set


def confine(order: Order) -> None:
    """Everything that a process can do to itself. Raises OSError; the caller must then exit."""
    _set_limits(order)
    kernel.drop_capabilities()
    kernel.refuse_new_privileges()
    if order.use_landlock:
        landlock.restrict(list(order.readable), list(order.writable), list(order.devices))
    if order.use_seccomp:
        own = None if order.processes else os.getpid()
        program = seccomp.program(
            order.machine, processes=order.processes, own_pid=own, metadata=order.metadata
        )
        kernel.install_filter(program)


def _set_limits(order: Order) -> None:
    bounds = {
        resource.RLIMIT_AS: (order.memory_bytes,) * 2,
        # Too small for a file; and at 1, unlike 0, the kernel starts no program that would read
        # the crashed one as root (/proc/sys/kernel/core_pattern with a pipe).
        resource.RLIMIT_CORE: (1, 1),
        resource.RLIMIT_CPU: (order.cpu_seconds, order.cpu_seconds + 1),
        resource.RLIMIT_FSIZE: (order.disk_bytes,) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_NICE: (0, 0),
        resource.RLIMIT_NOFILE: (_NUM_OPEN_FILES,) * 2,
        resource.RLIMIT_RTPRIO: (0, 0),
        resource.RLIMIT_SIGPENDING: (_NUM_OPEN_FILES,) * 2,
    }
    if order.num_processes:
        bounds[resource.RLIMIT_NPROC] = (order.num_processes,) * 2
    for which, (soft, hard) in bounds.items():
        allowed = resource.getrlimit(which)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(which, (soft, hard))
