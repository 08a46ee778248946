"""Hostile programs that reach for files, descriptors, devices and the network.

`hostile.py` sends each function's text, after `hostile_prelude.py`, as one program. Paths and ports
are the attack's own, or are only listed, opened or named. They write lines of evidence.
"""

import os
import stat
import sys
import time

from .hostile_prelude import (
    FACTS,
    MIB,
    attempt,
    call,
    escaped,
    fork_with,
    held,
    read_some,
    say,
    send_to,
    tried,
)

# -- reading ---------------------------------------------------------------------------------------


def read_shadow():
    for path in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/ssh/ssh_host_rsa_key"):
        attempt(path, read_some, path)


def read_passwd():
    for path in ("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf", "/etc/machine-id"):
        attempt(path, read_some, path)


def read_homes():
    for path in (FACTS["home"], "/root", "/home"):
        attempt(f"list {path}", os.listdir, path)
    for name in (".ssh/id_rsa", ".ssh/id_ed25519", ".bash_history", ".netrc", ".aws/credentials"):
        attempt(name, read_some, os.path.join(FACTS["home"], name))


def list_temporary_folders():
    for folder in {FACTS["temporary"], "/tmp", "/var/tmp", "/dev/shm", "/run"}:
        try:
            names = os.listdir(folder)
        except OSError as error:
            held(f"list {folder}: {error!r}")
            continue
        foreign = [name for name in names if name == os.path.basename(FACTS["ground"])]
        (escaped if foreign else held)(f"{folder} shows {names[:5]}")


def read_the_secret():
    path = FACTS["secret_file"]
    attempt("the secret", read_some, path)
    attempt("its folder", os.listdir, os.path.dirname(path))
    attempt("through ..", read_some, "../" * 30 + path.lstrip("/"))
    attempt("through //", read_some, "//" + path)
    os.symlink(path, "link")
    attempt("through a link", read_some, "link")
    os.symlink("/", "root")
    attempt("through a linked root", read_some, "root" + path)
    attempt("as a hard link", os.link, path, "hard")
    attempt("O_PATH", lambda: os.stat("canary.txt", dir_fd=os.open(FACTS["folder"], os.O_PATH)))


def look_at_the_secret():
    # Its existence, size and dates, which Landlock does not hide.
    attempt("stat", lambda: os.stat(FACTS["secret_file"]).st_size)
    attempt("chdir", os.chdir, os.path.dirname(FACTS["secret_file"]))


def watch_the_folder():
    path = os.fsencode(FACTS["folder"]) + b"\0"
    attempt("inotify", lambda: call("inotify_add_watch", call("inotify_init1", 0), path, 0xFFF))
    attempt("fanotify", call, "fanotify_init", 0, 0)


def read_the_checkout():
    attempt("the package's own text", read_some, FACTS["package_file"])
    for name in ("pyproject.toml", ".git/config", ".git/HEAD", ".env"):
        attempt(name, read_some, os.path.join(FACTS["checkout"], name))


def import_phiforge():
    try:
        import phiforge
    except ImportError as error:
        held(repr(error))
        return
    import subprocess

    # Installed for everybody: harmless as long as what it starts is held as well.
    command = [sys.executable, "-c", "from phiforge.verify.sandbox import Sandbox; Sandbox()"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=2, check=False)
        (held if done.returncode else escaped)(f"{phiforge.__file__}: {done.stderr[-200:]!r}")
    except (OSError, subprocess.SubprocessError) as error:
        held(repr(error))


def walk_everywhere():
    # Whatever can be listed from the root: nothing foreign, no device but five, nothing writable.
    tried()
    end = time.monotonic() + 1.5
    devices = {"null", "zero", "full", "random", "urandom"}
    name = FACTS["marker"]
    here = os.getcwd()
    for folder, folders, files in os.walk("/"):
        if time.monotonic() > end:
            break
        if folder.count("/") > 4 or folder == here:
            folders.clear()
            continue
        try:
            os.mkdir(os.path.join(folder, name))
            if not os.path.samefile(folder, here):
                escaped(f"made a folder in {folder}")
        except OSError:
            pass
        for file in files:
            path = os.path.join(folder, file)
            mode = os.lstat(path).st_mode
            if stat.S_ISSOCK(mode) or (
                (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and file not in devices
            ):
                escaped(f"a device or socket: {path}")
            if path == FACTS["secret_file"]:
                escaped(f"found {path}")


def scan_its_memory():
    # A run may be a fork of a process that served others: nothing of theirs may be left in it.
    import gc

    tried()
    prefix = FACTS["secret_prefix"]
    found, seen = set(), set()
    waiting = [*gc.get_objects(), *sys._current_frames().values()]
    while waiting and len(seen) < 400_000:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, str | bytes):
            text = thing if isinstance(thing, str) else thing.decode("latin-1")
            if prefix in text and len(text) < 10_000:
                found.add(text)
        elif isinstance(thing, dict | list | tuple | set):
            waiting.extend(gc.get_referents(thing))
    for text in found:
        position = text.index(prefix) + len(prefix)
        if text[position : position + 8].isalnum():
            escaped(f"memory holds {text!r}")


def read_the_environment():
    allowed = {
        "HOME", "TMPDIR", "PATH", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONHASHSEED", "TZ", "PWD",
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE",
        "PYTHONIOENCODING", "PYTHONUTF8", "OLDPWD", "SHLVL", "_", "MPLBACKEND",
    }  # fmt: skip
    for name, value in os.environ.items():
        say(f"HELD: {name}={value}")
    foreign = set(os.environ) - allowed
    if foreign:
        escaped(f"variables {sorted(foreign)}")
    if os.environ.get("HOME") == FACTS["home"]:
        escaped("HOME is the user's")


# -- writing ---------------------------------------------------------------------------------------


def write_temporary_folders():
    tried()
    for folder in (FACTS["temporary"], "/tmp", "/var/tmp", "/dev/shm"):
        try:
            with open(os.path.join(folder, FACTS["marker"]), "w") as file:
                file.write("left here")
        except OSError as error:
            held(f"{folder}: {error!r}")


def write_system_folders():
    tried()
    for folder in FACTS["places"]:
        path = os.path.join(folder, FACTS["marker"])
        for action in (lambda path: open(path, "w").close(), os.mkdir):
            try:
                action(path)
            except OSError as error:
                held(f"{folder}: {error!r}")
                continue
            if os.path.realpath(folder) != os.getcwd():
                escaped(f"made {path}")


def change_the_attacks_files():
    canary = os.path.join(FACTS["folder"], "canary.txt")
    inner = os.path.join(FACTS["folder"], "inner")
    attempt("overwrite", open, canary, "w")
    attempt("append", open, canary, "a")
    attempt("read and write", open, canary, "r+")
    attempt("truncate", os.truncate, canary, 0)
    attempt("rename", os.rename, canary, canary + ".moved")
    attempt("unlink", os.unlink, canary)
    attempt("rmdir", os.rmdir, inner)
    attempt("link", os.link, canary, canary + ".link")
    attempt("symlink", os.symlink, canary, canary + ".symlink")
    attempt("mkdir", os.mkdir, inner + "2")
    attempt("mkfifo", os.mkfifo, inner + "3")
    attempt("move in", os.rename, ".", inner + "4")


def change_metadata():
    # Landlock does not cover these: they need the namespaces or the filter.
    canary = os.path.join(FACTS["folder"], "canary.txt")
    attempt("chmod", os.chmod, canary, 0o600)
    attempt("chown", os.chown, canary, os.getuid(), os.getgid())
    attempt("utime", os.utime, canary, (1, 1))
    attempt("setxattr", os.setxattr, canary, "user.phiforge", b"1")
    attempt("getxattr", os.listxattr, canary)


def plant_links():
    # Links to outside in the working folder, for a clean-up that would follow them.
    tried()
    os.mkdir("folder")
    for name, target in (
        ("to-folder", FACTS["folder"]),
        ("to-file", os.path.join(FACTS["folder"], "canary.txt")),
        ("folder/to-root", "/"),
        ("folder/to-home", FACTS["home"]),
        ("folder/up", "../../.."),
    ):
        os.symlink(target, name)
    for target in (os.path.join(FACTS["folder"], "canary.txt"), FACTS["secret_file"]):
        attempt("hard link", os.link, target, "hard")
    os.chmod("folder", 0)


def race_with_links():
    # While the run is ended and cleared, a folder keeps turning into a link to outside and back.
    def swap():
        while True:
            try:
                os.rename("folder", "aside")
                os.symlink(FACTS["folder"], "folder")
                os.unlink("folder")
                os.rename("aside", "folder")
            except OSError:
                continue

    os.mkdir("folder")
    for index in range(20):
        with open(f"folder/canary{index}.txt", "w"):
            pass
    with open("folder/canary.txt", "w"):
        pass
    tried()
    try:
        fork_with(swap)
    except OSError as error:
        held(error)
        import threading

        threading.Thread(target=swap, daemon=True).start()
    time.sleep(0.2)


def leave_what_is_hard_to_remove():
    tried()
    here = os.getcwd()
    for index, name in enumerate((b"x" * 255, b"new\nline", b"\xff\xfe", b"-rf", b"*", b" ")):
        try:
            os.mkdir(os.fsencode(here) + b"/" + name)
            os.mkfifo(os.fsencode(here) + b"/fifo%d" % index)
        except OSError as error:
            held(error)
    os.mkdir("closed")
    with open("closed/file", "w"):
        pass
    os.chmod("closed", 0)
    try:
        for _ in range(3000):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    except OSError as error:
        held(f"{error!r}")
    os.chmod(here, 0)


def open_by_handle():
    import ctypes

    handle = ctypes.create_string_buffer(8 + 128)
    ctypes.c_uint.from_buffer(handle).value = 128
    mount = ctypes.c_int()
    for path in (FACTS["secret_file"], "/"):
        try:
            name = os.fsencode(path) + b"\0"
            call("name_to_handle_at", -100, name, handle, ctypes.byref(mount), 0)
        except OSError as error:
            held(f"name_to_handle_at {path}: {error!r}")
            continue
        folder = os.open(".", os.O_RDONLY)
        attempt(f"open_by_handle_at {path}", call, "open_by_handle_at", folder, handle, 0)
    # inode 2, the usual root of a disk's file system, guessed
    guess = ctypes.create_string_buffer(b"\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0", 16)
    folder = os.open(".", os.O_RDONLY)
    attempt("a guessed handle", call, "open_by_handle_at", folder, guess, 0)


# -- disk ------------------------------------------------------------------------------------------


def write_one_big_file():
    written = 0
    try:
        with open("big", "wb", buffering=0) as file:
            while written < 1024 * MIB:
                written += file.write(b"x" * MIB)
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    if written > 2 * FACTS["disk_bytes"]:
        escaped(f"wrote {written // MIB} MB")


def write_many_medium_files():
    written = 0
    try:
        for index in range(200):
            with open(f"medium{index}", "wb", buffering=0) as file:
                for _ in range(5):
                    written += file.write(b"x" * MIB)
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    if written > 50 * FACTS["disk_bytes"]:
        escaped(f"wrote {written // MIB} MB")


def write_deleted_files():
    written, kept = 0, []
    try:
        for index in range(40):
            file = open(f"gone{index}", "w+b", buffering=0)  # noqa: SIM115
            kept.append(file)
            os.unlink(file.name)
            for _ in range(12):
                written += file.write(b"x" * MIB)
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    time.sleep(0.5)
    if written > 4 * FACTS["disk_bytes"]:
        escaped(f"{len(kept)} deleted files hold {written // MIB} MB")


def write_a_sparse_file():
    with open("sparse", "wb", buffering=0) as file:
        attempt("1 TB of nothing", file.truncate, 2**40)
        attempt("a byte far away", lambda: (file.seek(2**40), file.write(b"x")))
        attempt("fallocate", os.posix_fallocate, file.fileno(), 0, 1024 * MIB)


def make_200_thousand_files():
    made = 0
    try:
        for index in range(200_000):
            os.close(os.open(f"f{index}", os.O_CREAT | os.O_WRONLY))
            made += 1
    except OSError as error:
        held(f"after {made} files: {error!r}")
    if made > 50_000:
        escaped(f"made {made} files")


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
