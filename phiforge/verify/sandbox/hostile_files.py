"""Hostile programs that reach for files: read, write, race, and fill the disk.

`hostile.py` sends each function's text, after `hostile_prelude.py`, as one program. Paths are
the attack's own, or are only listed and opened. They write lines of evidence.
"""

import os
import stat
import sys
import time

from .hostile_prelude import (
    FACTS,
    LIBC,
    MIB,
    attempt,
    call,
    escaped,
    fork_with,
    held,
    read_some,
    say,
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
    # Where Python itself lies below a home, the folders on the way to it may show.
    known = set("/".join([*sys.path, sys.prefix, sys.base_prefix, os.getcwd()]).split("/"))
    for path in (FACTS["home"], "/root", "/home"):
        try:
            foreign = set(os.listdir(path)) - known if path != "/" else set()
            (escaped if foreign else held)(f"list {path}: {sorted(foreign)}")
        except OSError as error:
            held(f"list {path}: {error!r}")
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


def look_at_the_secret():
    # Its existence, size and dates, which Landlock does not hide.
    attempt("stat", lambda: os.stat(FACTS["secret_file"]).st_size)
    attempt("O_PATH", lambda: os.stat("canary.txt", dir_fd=os.open(FACTS["folder"], os.O_PATH)))
    attempt("attributes", os.listxattr, FACTS["secret_file"])
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
    try:
        os.chmod("folder", 0)
    except OSError as error:
        held(f"chmod: {error!r}")


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
    os.mkdir("closed", 0o700)
    with open("closed/file", "w"):
        pass
    os.mkdir("write-only", 0o300)
    with open("write-only/file", "w"):
        pass
    try:
        for _ in range(3000):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    except OSError as error:
        held(f"{error!r}")
    for folder in (os.path.join(here, "closed"), here):
        try:
            os.chmod(folder, 0)
        except OSError as error:
            held(f"chmod {folder}: {error!r}")


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
    tried()
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
    tried()
    try:
        for index in range(200):
            with open(f"medium{index}", "wb", buffering=0) as file:
                written += file.write(b"x" * (FACTS["disk_bytes"] // 2))
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    time.sleep(0.5)
    if written > 4 * FACTS["disk_bytes"]:
        escaped(f"{written // MIB} MB lie there")


def hide_files_from_the_watch():
    # In a folder that cannot be listed, and in one too deep for a path.
    written = 0
    tried()
    try:
        os.mkdir("unlisted", 0o300)
        os.chdir("unlisted")
        for index in range(10):
            with open(f"a{index}", "wb", buffering=0) as file:
                written += file.write(b"x" * (FACTS["disk_bytes"] // 2))
        for _ in range(30):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        for index in range(10):
            with open(f"b{index}", "wb", buffering=0) as file:
                written += file.write(b"x" * (FACTS["disk_bytes"] // 2))
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    time.sleep(0.5)
    if written > 4 * FACTS["disk_bytes"]:
        escaped(f"{written // MIB} MB lie there")


def write_deleted_files():
    written, kept = 0, []
    tried()
    try:
        for index in range(40):
            file = open(f"gone{index}", "w+b", buffering=0)  # noqa: SIM115
            kept.append(file)
            os.unlink(file.name)
            written += file.write(b"x" * (FACTS["disk_bytes"] // 2))
    except OSError as error:
        held(f"after {written // MIB} MB: {error!r}")
    time.sleep(0.5)
    if written > 4 * FACTS["disk_bytes"]:
        escaped(f"{len(kept)} deleted files hold {written // MIB} MB")


def hide_files_in_mappings():
    # Without a name and without a descriptor, but kept by what is mapped of them.
    import ctypes

    written, size = 0, FACTS["disk_bytes"] // 2
    LIBC.mmap.restype = ctypes.c_void_p  # Python's own mmap would keep a descriptor
    LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    tried()
    try:
        for index in range(40):
            with open(f"mapped{index}", "w+b", buffering=0) as file:
                if LIBC.mmap(None, 4096, 1, 1, file.fileno(), 0) == ctypes.c_void_p(-1).value:
                    raise OSError(ctypes.get_errno(), "mmap")
                os.unlink(file.name)
                written += file.write(b"x" * size)
    except (OSError, MemoryError) as error:
        held(f"after {written // MIB} MB: {error!r}")
    time.sleep(0.5)
    if written > 4 * FACTS["disk_bytes"]:
        escaped(f"mappings hold {written // MIB} MB")


def write_a_sparse_file():
    with open("sparse", "wb", buffering=0) as file:
        attempt("1 TB of nothing", file.truncate, 2**40)
        attempt("a byte far away", lambda: (file.seek(2**40), file.write(b"x")))
        attempt("fallocate", os.posix_fallocate, file.fileno(), 0, 1024 * MIB)


def make_200_thousand_files():
    made = 0
    tried()
    try:
        for index in range(200_000):
            os.close(os.open(f"f{index}", os.O_CREAT | os.O_WRONLY))
            made += 1
    except OSError as error:
        held(f"after {made} files: {error!r}")
    if made > 50_000:
        escaped(f"made {made} files")
