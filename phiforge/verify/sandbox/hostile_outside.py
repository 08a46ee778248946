"""Hostile programs that reach for descriptors, devices, /proc and the network.

`hostile.py` sends each function's text, after `hostile_prelude.py`, as one program. Addresses are
the attack's own listeners; devices are only opened. They write lines of evidence.
"""

import os
import stat

from .hostile_prelude import (
    FACTS,
    attempt,
    escaped,
    held,
    read_some,
    send_to,
    tried,
)

# -- descriptors and devices -----------------------------------------------------------------------


def search_descriptors():
    import fcntl

    tried()
    extra = []
    for descriptor in range(4097):
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
        except OSError:
            continue
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind) or stat.S_ISSOCK(kind):
            escaped(f"descriptor {descriptor} is a folder or socket")
        if os.isatty(descriptor):
            escaped(f"descriptor {descriptor} is a terminal")
        if descriptor > 2:
            extra.append(descriptor)
    if len(extra) > 1:
        escaped(f"open beside the usual three: {extra}")
    for descriptor in (*range(3), *extra):
        try:
            os.set_blocking(descriptor, False)
            text = os.read(descriptor, 4096)
        except OSError:
            continue
        if text:
            escaped(f"descriptor {descriptor} gives {text[:200]!r}")


def write_to_descriptors():
    tried()
    for descriptor in range(3, 4097):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, FACTS["marker"].encode())
        except OSError:
            continue


def open_devices():
    for name in (
        "mem", "kmem", "port", "kmsg", "sda", "vda", "nvme0n1", "loop0", "loop-control", "fuse",
        "kvm", "ptmx", "tty", "console", "tty0", "tty1", "net/tun", "input/event0", "hpet",
        "mapper/control", "vhost-net", "vsock", "uinput", "autofs", "btrfs-control", "nvidia0",
        "nvidiactl", "dri/card0", "snapshot", "rtc0", "cpu/0/msr", "userfaultfd",
    ):  # fmt: skip
        for flags in (os.O_RDONLY, os.O_WRONLY):
            try:
                os.close(os.open(f"/dev/{name}", flags | os.O_NONBLOCK))
                escaped(f"opened /dev/{name}")
            except OSError as error:
                held(f"{name}: {error.strerror}")


def make_devices():
    for name, kind, device in (
        ("memory", stat.S_IFCHR, os.makedev(1, 1)),
        ("disk", stat.S_IFBLK, os.makedev(8, 0)),
        ("virtual", stat.S_IFBLK, os.makedev(254, 0)),
        ("terminal", stat.S_IFCHR, os.makedev(5, 2)),
    ):
        attempt(f"mknod {name}", os.mknod, name, 0o666 | kind, device)
        if os.path.exists(name):
            attempt(f"open {name}", os.open, name, os.O_RDONLY)


def inject_terminal_input():
    import fcntl

    for path in (0, 1, 2, "/dev/tty", "/dev/pts/0", "/dev/console"):
        try:
            descriptor = path if isinstance(path, int) else os.open(path, os.O_RDWR)
        except OSError as error:
            held(f"{path}: {error!r}")
            continue
        for request in (0x5412, 0x541C):  # TIOCSTI, TIOCLINUX
            attempt(f"ioctl {request:x} on {path}", fcntl.ioctl, descriptor, request, b"\n")


# -- /proc -----------------------------------------------------------------------------------------


def read_proc():
    client, server = FACTS["client"], FACTS["client_parent"]
    for pid in ("self", "1", os.getppid(), client, server, FACTS["victim"]):
        for name in ("environ", "mem", "maps", "stack", "syscall", "auxv", "cmdline", "io"):
            if pid == "self" and name in ("mem", "maps", "auxv", "cmdline", "io", "syscall"):
                continue
            if pid == "self" and name == "environ":
                try:
                    read_some(f"/proc/{pid}/{name}")  # its own: the attack looks for the secret
                except OSError as error:
                    held(f"{name}: {error!r}")
                continue
            attempt(f"/proc/{pid}/{name}", read_some, f"/proc/{pid}/{name}")
        for name in ("fd", "task", "map_files", "ns"):
            if pid != "self":
                attempt(f"/proc/{pid}/{name}", os.listdir, f"/proc/{pid}/{name}")
        for name in ("root", "cwd"):
            path = f"/proc/{pid}/{name}"
            attempt(path, read_some, path + FACTS["secret_file"])
            attempt(path, os.listdir, path + "/etc")


def write_proc():
    for path in (
        "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hostname", "sysrq-trigger",
        "sys/vm/drop_caches", "sys/kernel/ns_last_pid", "sys/fs/binfmt_misc/register",
        "1/oom_score_adj", f"{FACTS['client']}/oom_score_adj", f"{FACTS['client']}/mem",
        f"{FACTS['client']}/comm", f"{FACTS['victim']}/comm", f"{os.getppid()}/mem", "1/mem",
    ):  # fmt: skip
        attempt(path, os.open, f"/proc/{path}", os.O_WRONLY)  # opened only, nothing is written
    for path in ("/sys/kernel/uevent_helper", "/sys/fs/cgroup/cgroup.procs", "/sys/power/state"):
        attempt(path, os.open, path, os.O_WRONLY)
    for path in ("/sys/class/net", "/sys/devices", "/sys/fs/cgroup", "/proc/net", "/proc/bus"):
        attempt(path, os.listdir, path)


# -- the network: only to listeners that the attack opened -----------------------------------------


def connect_tcp():
    import socket

    address = ("127.0.0.1", FACTS["tcp"])
    attempt("tcp", send_to, socket.AF_INET, socket.SOCK_STREAM, address)


def connect_tcp_version_6():
    import socket

    address = ("::1", FACTS["tcp6"])
    attempt("tcp6", send_to, socket.AF_INET6, socket.SOCK_STREAM, address)


def send_udp():
    import socket

    tried()  # sending reports no failure even where nobody hears
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", FACTS["udp"])),
        (socket.AF_INET6, ("::1", FACTS["udp6"])),
    ):
        try:
            held(send_to(family, socket.SOCK_DGRAM, address))
        except OSError as error:
            held(f"udp: {error!r}")


def look_up_a_name():
    # A DNS question to the attack's own listener: the resolver of this machine is left in peace.
    import socket

    tried()
    question = b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x06secret\x07invalid\0\0\x01\0\x01"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.sendto(question, ("127.0.0.1", FACTS["dns"]))
            held("sent, to nobody")
    except OSError as error:
        held(f"dns: {error!r}")


def connect_unix():
    import socket

    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        attempt("path", send_to, socket.AF_UNIX, kind, FACTS["unix"])


def connect_abstract():
    import socket

    attempt("abstract", send_to, socket.AF_UNIX, socket.SOCK_STREAM, "\0" + FACTS["abstract"])


def listen():
    import socket

    tried()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", FACTS["callback"]))
            server.listen()
            server.settimeout(0.5)
            connection = server.accept()[0]
            connection.send(FACTS["marker"].encode())
            escaped("somebody outside connected")
    except OSError as error:
        held(f"listen: {error!r}")


def make_odd_sockets():
    import socket

    for name, family, kind, protocol in (
        ("netlink", 16, socket.SOCK_RAW, 0),
        ("packet", 17, socket.SOCK_RAW, 0x300),
        ("vsock", 40, socket.SOCK_STREAM, 0),
        ("alg", 38, socket.SOCK_SEQPACKET, 0),
        ("bluetooth", 31, socket.SOCK_RAW, 1),
        ("can", 29, socket.SOCK_RAW, 1),
        ("xdp", 44, socket.SOCK_RAW, 0),
        ("key", 15, socket.SOCK_RAW, 2),
        ("raw", socket.AF_INET, socket.SOCK_RAW, 1),
        ("ping", socket.AF_INET, socket.SOCK_DGRAM, 1),
        ("sctp", socket.AF_INET, socket.SOCK_STREAM, 132),
        ("mptcp", socket.AF_INET, socket.SOCK_STREAM, 262),
    ):
        attempt(name, socket.socket, family, kind, protocol)
