"""Real programs under the system call filter: what they need works, what they must not do fails.

Run: pytest tests/verify/sandbox/test_seccomp_programs.py. Writes into pytest's temporary folders.
"""

import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phiforge.verify.sandbox.jail import seccomp
from phiforge.verify.sandbox.jail.seccomp import MACHINES

JAIL = Path(seccomp.__file__).parent.parent
PRELUDE = """
import ctypes, errno, json, os, signal, sys
sys.path.insert(0, {jail!r})
from jail import seccomp, syscalls
libc = ctypes.CDLL(None, use_errno=True)
options = {options!r}
if options.pop("alone", False):
    options["own_pid"] = os.getpid()
code = seccomp.program({machine!r}, **options)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0, ctypes.get_errno()
def call(name, *arguments):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(syscalls.NUMBERS[{machine!r}][name]), *map(ctypes.c_long, arguments))
    return ctypes.get_errno()
"""

real = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES,
    reason="the filter is for Linux on x86-64 and aarch64",
)


def confined(body, folder, **options):
    """Run a Python text under the filter; with `alone`, signals go to the process itself only."""
    prelude = PRELUDE.format(jail=str(JAIL), options=options, machine=platform.machine())
    (folder / "program.py").write_text(prelude + body)
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2", "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


THREADS = """
import threading
seen = []
threads = [threading.Thread(target=seen.append, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert sorted(seen) == [0, 1, 2, 3]
"""
ASYNCIO = """
import asyncio
async def main():
    a, b = __import__("socket").socketpair()
    reader, writer = await asyncio.open_connection(sock=a)
    b.sendall(b"across"); b.close()
    assert await reader.read() == b"across"
    writer.writelines([b"x", b"y"])
    await asyncio.to_thread(sum, [1])
    await asyncio.sleep(0)
    writer.close()
asyncio.run(main())
"""
NUMPY = """
import numpy
a = numpy.arange(90000.0).reshape(300, 300) / 90000
assert numpy.allclose(a @ numpy.linalg.inv(a + numpy.eye(300)) @ (a + numpy.eye(300)), a)
m = numpy.memmap("m", mode="w+", shape=(10,)); m[3] = 7; m.flush()
"""
SYMPY = """
import sympy
x = sympy.symbols("x")
assert sympy.integrate(sympy.sin(x) ** 2, (x, 0, sympy.pi)) == sympy.pi / 2
"""
SQLITE = """
import sqlite3
for place in (":memory:", "data.db"):
    connection = sqlite3.connect(place)
    if place == "data.db":
        connection.execute("pragma journal_mode=wal")
    connection.execute("create table t (a)")
    connection.executemany("insert into t values (?)", [(i,) for i in range(100)])
    connection.commit()
    assert connection.execute("select sum(a) from t").fetchone() == (4950,)
    connection.close()
"""
FILES = """
import fcntl, mmap, shutil, tempfile
with tempfile.TemporaryDirectory() as folder:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"abc" * 5000); file.flush()
        fcntl.flock(file, fcntl.LOCK_EX); fcntl.lockf(file, fcntl.LOCK_UN)
        with mmap.mmap(file.fileno(), 0) as view:
            view[0:3] = b"xyz"; view.flush()
        shutil.copy2(file.name, folder + "/copy")
        os.sendfile(os.open(folder + "/sent", os.O_WRONLY | os.O_CREAT), file.fileno(), 0, 10)
    shutil.copytree(folder, folder + "/a/b", ignore=lambda *_: ["a"])
    shutil.make_archive("archive", "gztar", folder); shutil.unpack_archive("archive.tar.gz", "out")
    shutil.move(folder + "/copy", folder + "/moved")
    os.chmod(folder + "/moved", 0o600); os.utime(folder + "/moved")
    os.truncate(folder + "/moved", 3)
    os.symlink("moved", folder + "/link"); os.link(folder + "/moved", folder + "/hard")
    assert sorted(os.listdir(folder)) == ["a", "hard", "link", "moved", "sent"]
    assert open(folder + "/link").read() == "xyz"
assert not os.isatty(0) and not sys.stdout.isatty()
"""
SIGNALS = """
import select, time, threading
seen = []
for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: seen.append(number))
signal.raise_signal(signal.SIGUSR1)
signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
os.kill(os.getpid(), signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 0.01)
signal.sigtimedwait([], 0)
while signal.SIGALRM not in seen:
    time.sleep(0.01)
assert seen == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGALRM]
"""
WAITING = """
import select, selectors
r, w = os.pipe(); os.write(w, b"x")
assert select.select([r], [], [], 0)[0] == [r] and select.poll()
poll = select.epoll(); poll.register(r, select.EPOLLIN); assert poll.poll(0) == [(r, 1)]
event = os.eventfd(3); assert os.eventfd_read(event) == 3
assert all(s().close() is None for s in (selectors.PollSelector, selectors.EpollSelector))
"""
ABOUT_ITSELF = """
import getpass, platform, resource, secrets, uuid
uuid.uuid1(); uuid.uuid4(); secrets.token_bytes(9); platform.platform(); os.cpu_count()
os.sched_getaffinity(0); os.nice(1); os.getgroups(); os.umask(0o22); os.times()
os.sysconf("SC_NPROCESSORS_ONLN")
resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.getrusage(resource.RUSAGE_SELF)
resource.prlimit(0, resource.RLIMIT_NOFILE)
"""
SUBPROCESS = """
import asyncio, subprocess
run = subprocess.run(
    [sys.executable, "-c", "print(input())"], input=b"hello", capture_output=True
)
assert run.stdout == b"hello\\n", run
assert subprocess.run("echo a b | tr a-z A-Z", shell=True, capture_output=True).stdout == b"A B\\n"
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
child.kill(); assert child.wait() == -signal.SIGKILL
async def main():
    child = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert await child.communicate(b"through") == (b"through", None)
asyncio.run(main())
pid = os.posix_spawn("/bin/true", ["true"], {})
assert os.waitpid(pid, 0)[1] == 0
"""
MULTIPROCESSING = """
import concurrent.futures, multiprocessing
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
    value = context.Value("i", 3); assert value.value == 3
    a, b = context.Pipe(); a.send([1]); assert b.recv() == [1]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
"""

IN_ONE_PROCESS = {
    "threads": THREADS,
    "asyncio": ASYNCIO,
    "numpy": NUMPY,
    "sympy": SYMPY,
    "sqlite": SQLITE,
    "files": FILES,
    "signals": SIGNALS,
    "waiting": WAITING,
    "about itself": ABOUT_ITSELF,
}
IN_SEVERAL = {"subprocess": SUBPROCESS, "multiprocessing": MULTIPROCESSING}


@real
@pytest.mark.parametrize("body", [pytest.param(b, id=n) for n, b in IN_ONE_PROCESS.items()])
@pytest.mark.parametrize("alone", [False, True], ids=["processes", "alone"])
def test_nothing_needed_is_refused(body, alone, tmp_path):
    options = {"processes": False, "alone": True} if alone else {}
    result = confined(body, tmp_path, **options)
    assert (result.returncode, result.stderr) == (0, "")


@real
@pytest.mark.parametrize("body", [pytest.param(b, id=n) for n, b in IN_SEVERAL.items()])
def test_programs_of_several_processes(body, tmp_path):
    result = confined(body, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def outcomes(body, folder, **options):
    """The body's list of (what, error name or "went through"), as text."""
    record = (
        "import socket, subprocess, fcntl, threading, tempfile\n"
        "def attempt(action):\n"
        "    try: action()\n"
        "    except OSError as error: return errno.errorcode[error.errno]\n"
        "    return 'went through'\n"
    )
    result = confined(record + body, folder, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


@real
def test_refused_calls_fail_as_permission_errors(tmp_path):
    body = """
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    print(attempt(lambda: socket.socket(family, socket.SOCK_DGRAM)))
print(attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)))
print(attempt(lambda: socket.socketpair()[0].send(b"x", socket.MSG_OOB)))
print(attempt(lambda: os.memfd_create("x")))
print(attempt(lambda: os.mkfifo("fifo")))
print(attempt(lambda: os.chmod("program.py", 0o4755)))
print(attempt(lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o4755)))
print(attempt(lambda: os.chown("program.py", os.getuid(), os.getgid())))
print(attempt(lambda: os.setxattr("program.py", "user.a", b"x")))
print(attempt(lambda: fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())))
print(attempt(lambda: fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)))
print(attempt(lambda: fcntl.ioctl(0, 0x5412, b"x")))
print(attempt(lambda: os.setuid(os.getuid())))
print(attempt(lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))))
print(errno.errorcode[call("unshare", 0x10000000)])
print(errno.errorcode[call("ptrace", 0, 0, 0, 0)])
print(errno.errorcode[call("io_uring_setup", 1, 0)])
print(errno.errorcode[call("keyctl", 0, 0)])
print(errno.errorcode[call("prctl", 22, 2, 0)])
print(errno.errorcode[call("execveat", 0, 0, 0, 0, 0x1000)])
"""
    assert outcomes(body, tmp_path) == ["EPERM"] * 23
    assert sorted(p.name for p in tmp_path.iterdir()) == ["program.py"]


@real
def test_calls_whose_flags_lie_in_memory_do_not_exist(tmp_path):
    body = (
        'print(errno.errorcode[call("clone3", 0, 0)], errno.errorcode[call("openat2", 0, 0, 0, 0)])'
    )
    assert outcomes(body, tmp_path) == ["ENOSYS ENOSYS"]


@real
def test_alone_starts_nothing_and_signals_nobody(tmp_path):
    body = """
print(attempt(os.fork))
print(attempt(lambda: subprocess.run(["/bin/true"])))
print(attempt(lambda: os.posix_spawn("/bin/true", ["true"], {})))
print(attempt(lambda: os.kill(os.getppid(), 0)))
print(attempt(lambda: os.kill(-1, 0)))
print(attempt(lambda: os.killpg(0, 0)))
print(attempt(lambda: os.sched_setaffinity(os.getppid(), {0})))
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
sys.stdout.flush()
os.execv("/bin/echo", ["echo", "another program"])
"""
    found = outcomes(body, tmp_path, processes=False, alone=True)
    assert found == ["EPERM"] * 7 + ["thread", "another program"]


@real
def test_a_child_is_under_the_same_filter(tmp_path):
    body = """
sys.stdout.flush()
subprocess.run([sys.executable, "-c", "import socket; socket.socket()"], stderr=sys.stdout)
"""
    assert "PermissionError" in outcomes(body, tmp_path)[-1]


@real
@pytest.mark.parametrize("options", [{}, {"processes": False, "alone": True}])
def test_abort_and_faults_end_by_their_signals(options, tmp_path):
    assert confined("os.abort()", tmp_path, **options).returncode == -signal.SIGABRT
    fault = "ctypes.string_at(0)"
    assert confined(fault, tmp_path, **options).returncode == -signal.SIGSEGV


@real
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is a part of x86-64")
def test_x32_kills(tmp_path):
    body = 'libc.syscall(ctypes.c_long(0x40000000 | 39)); print("still here")'
    result = confined(body, tmp_path)
    assert (result.returncode, result.stdout) == (-signal.SIGSYS, "")


@real
@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs i386 instructions")
def test_i386_calls_kill(tmp_path):
    """`mov eax, 20; int 0x80; ret`: the i386 table's getpid, from 64-bit code."""
    body = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("returned", ctypes.CFUNCTYPE(ctypes.c_int)(start)() > 0, flush=True)
"""
    free = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
    if free.stdout != "returned True\n":
        pytest.skip("this kernel runs no i386 calls")
    result = confined(body, tmp_path)
    assert (result.returncode, result.stdout) == (-signal.SIGSYS, "")
