"""The system call filter: every call's fate on both machines, by an interpreter of its program.

Run: pytest tests/verify/sandbox/test_seccomp.py. Writes nothing.
"""

import errno
import fcntl
import re
import socket
import struct
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiforge.verify.sandbox.jail import seccomp
from phiforge.verify.sandbox.jail.seccomp import ALLOW, ENOSYS, EPERM, KILL, MACHINES, refuse
from phiforge.verify.sandbox.jail.syscalls import ALLOWED, METADATA, NUMBERS, REFUSED

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FOREIGN = {"i386": 0x40000003, "arm": 0x40000028, "riscv64": 0xC00000F3}
OWN = 4321

# Neither allowed nor known as dangerous: old kernels do not have them either, so libc falls back.
# A name that is new in the tables must be put here, or into one of the lists, by somebody.
ABSENT = {
    "x86_64": """uselib ustat sysfs _sysctl create_module get_kernel_syms query_module nfsservctl
    getpmsg putpmsg afs_syscall tuxcall security set_thread_area get_thread_area epoll_ctl_old
    epoll_wait_old vserver inotify_init""",
    "aarch64": "nfsservctl",
    "both": """clone3 openat2 sync syncfs sync_file_range splice tee io_setup io_destroy io_submit
    io_cancel io_getevents io_pgetevents lookup_dcookie remap_file_pages get_robust_list mbind
    set_mempolicy set_mempolicy_home_node ioprio_get inotify_init1 inotify_add_watch
    inotify_rm_watch pkey_mprotect pkey_alloc pkey_free futex_waitv futex_wake futex_wait
    futex_requeue cachestat map_shadow_stack statmount listmount lsm_get_self_attr
    lsm_list_modules mseal getxattrat listxattrat file_getattr""",
}

# What must not pass whatever its arguments are.
NEVER = """socket connect bind listen accept4 ptrace process_vm_readv process_vm_writev pidfd_getfd
kcmp process_madvise mount umount2 pivot_root chroot open_tree move_mount fsopen fsconfig fsmount
fspick mount_setattr unshare setns bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
io_uring_register keyctl add_key request_key memfd_create memfd_secret execveat open_by_handle_at
name_to_handle_at kexec_load kexec_file_load init_module finit_module delete_module reboot swapon
swapoff sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex acct quotactl
fanotify_init vmsplice mq_open msgget shmget semget setuid setgid setresuid setresgid setgroups
capset fchown mknodat syslog seccomp landlock_restrict_self clone3 openat2""".split()

both_machines = pytest.mark.parametrize("machine", MACHINES)


def run_filter(program, number, arguments=(), architecture=ARCHITECTURES["x86_64"]):
    """What the kernel would do with one call: an interpreter of the few codes that filters use."""
    arguments = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", program))
    word = position = 0
    while True:
        operation, if_true, if_false, operand = code[position]
        position += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            (word,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x54:
            word &= operand
        elif operation == 0x05:
            position += operand
        else:
            holds = {0x15: word == operand, 0x35: word >= operand, 0x45: word & operand != 0}
            position += if_true if holds[operation] else if_false


def fate(machine, name, *arguments, **options):
    program = seccomp.program(machine, **options)
    return run_filter(program, NUMBERS[machine][name], arguments, ARCHITECTURES[machine])


# ---- the tables ----------------------------------------------------------------------------------


def header_numbers(path):
    pattern = re.compile(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", re.MULTILINE)
    numbers = {name: int(number) for name, number in pattern.findall(path.read_text())}
    if "fstatat" in numbers:  # of two names for one number, the one of 64-bit machines
        numbers["newfstatat"] = numbers.pop("fstatat")
    return numbers


@pytest.mark.parametrize(
    ("machine", "paths", "not_there"),
    [
        (
            "x86_64",
            ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"),
            {"uretprobe", "uprobe"},  # the kernel's own, no program calls them
        ),
        (
            "aarch64",
            ("asm-generic/unistd.h",),
            {"syscalls", "arch_specific_syscall", "sync_file_range2"},
        ),
    ],
)
def test_numbers_are_the_kernel_headers(machine, paths, not_there):
    found = [Path("/usr/include", path) for path in paths if Path("/usr/include", path).exists()]
    if not found:
        pytest.skip(f"no kernel headers here: /usr/include/{paths[0]} (package linux-libc-dev)")
    header = header_numbers(found[0])
    newest = max(NUMBERS[machine].values())
    expected = {
        name: number
        for name, number in header.items()
        # 403 to 423 are the wider times of 32-bit machines
        if name not in not_there and not 403 <= number <= 423 and number <= newest
    }
    ours = {name: NUMBERS[machine].get(name) for name in expected}
    assert ours == expected
    invented = {n for n in NUMBERS[machine] if n not in header} - {None}
    assert all(NUMBERS[machine][name] > max(expected.values()) for name in invented)
    assert len(expected) > 300 - (machine == "aarch64") * 20


def test_constants_are_those_of_the_standard_library():
    sources = ((seccomp.FCNTL, fcntl), (seccomp.IOCTL, termios), (seccomp.SETSOCKOPT, socket))
    for constants, module in sources:
        known = {name: getattr(module, name) for name in constants if hasattr(module, name)}
        assert len(known) >= 4
        assert known == {name: constants[name] for name in known}


@both_machines
def test_every_name_has_one_fate(machine):
    checked = set(seccomp.fates(machine)) - ALLOWED - REFUSED
    absent = set((ABSENT[machine] + " " + ABSENT["both"]).split())
    groups = [ALLOWED, REFUSED, checked, absent]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other
    assert set(NUMBERS[machine]) <= set().union(*groups)
    assert absent <= set(NUMBERS[machine])
    assert len(set(NUMBERS[machine].values())) == len(NUMBERS[machine])
    for name, number in NUMBERS[machine].items():
        result = run_filter(seccomp.program(machine), number, architecture=ARCHITECTURES[machine])
        if name in ALLOWED:
            assert result == ALLOW, name
        elif name in REFUSED:
            assert result == EPERM, name
        elif name in absent:
            assert result == ENOSYS, name


def test_lists_name_only_calls_that_exist():
    names = set(NUMBERS["x86_64"]) | set(NUMBERS["aarch64"])
    assert names >= ALLOWED | REFUSED | set(NEVER)
    assert {n for m in MACHINES for n in seccomp.fates(m)} >= ALLOWED | REFUSED


# ---- the program as a whole ----------------------------------------------------------------------

words = st.integers(0, 2**32 - 1)
long_words = st.one_of(words, st.integers(0, 2**64 - 1))
options = st.sampled_from([{}, {"processes": False}, {"processes": False, "own_pid": OWN}])


@both_machines
@given(number=words, arguments=st.lists(long_words, max_size=6), options=options)
def test_unlisted_numbers_do_not_exist(machine, number, arguments, options):
    program = seccomp.program(machine, **options)
    result = run_filter(program, number, arguments, ARCHITECTURES[machine])
    listed = {NUMBERS[machine][name] for name in seccomp.fates(machine)}
    if machine == "x86_64" and number & 0x40000000:
        assert result == KILL
    elif number not in listed:
        assert result == ENOSYS


@given(name=st.sampled_from(sorted(NUMBERS["x86_64"])), arguments=st.lists(long_words, max_size=6))
def test_x32_calls_kill(name, arguments):
    number = NUMBERS["x86_64"][name] | 0x40000000
    assert run_filter(seccomp.program("x86_64"), number, arguments) == KILL


@both_machines
@given(data=st.data(), arguments=st.lists(long_words, max_size=6), options=options)
def test_foreign_architectures_kill(machine, data, arguments, options):
    other = [a for m, a in ARCHITECTURES.items() if m != machine]
    architecture = data.draw(st.sampled_from([*FOREIGN.values(), *other]))
    number = data.draw(words)
    program = seccomp.program(machine, **options)
    assert run_filter(program, number, arguments, architecture) == KILL


@both_machines
@given(name=st.sampled_from(NEVER), arguments=st.lists(long_words, max_size=6), options=options)
def test_dangerous_calls_never_pass(machine, name, arguments, options):
    expected = ENOSYS if name in ("clone3", "openat2") else EPERM
    assert fate(machine, name, *arguments, **options) == expected


@both_machines
def test_a_stricter_filter_allows_nothing_more(machine):
    values = (0, 1, 2, 9, OWN, 0x11, 0x50F00, 0x541B, 0o100, 0o4755, 2**32, 2**32 + OWN)
    fates = seccomp.fates(machine, processes=False, own_pid=OWN)
    assert set(fates) == set(seccomp.fates(machine))
    for name in set(fates) - ALLOWED - REFUSED:
        for first in values:
            for second in values:
                strict = fate(machine, name, first, second, processes=False, own_pid=OWN)
                if strict == ALLOW and not (name == "prlimit64" and first % 2**32 == OWN):
                    assert fate(machine, name, first, second) == ALLOW, (name, first, second)


def test_programs_fit_the_kernel():
    for machine in MACHINES:
        for processes in (True, False):
            program = seccomp.program(machine, processes=processes, own_pid=2**22 - 1)
            assert len(program) // 8 <= 4096  # BPF_MAXINSNS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"machine": "riscv64"}, "riscv64.*x86_64, aarch64"),
        ({"machine": "x86_64", "own_pid": 0}, "own_pid 0"),
        ({"machine": "x86_64", "own_pid": -1}, "own_pid -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        seccomp.program(**arguments)


def evaluate(decision, data):
    if isinstance(decision, int):
        return decision
    (word,) = struct.unpack_from("<I", data, decision.word)
    if isinstance(decision, seccomp.AnyBit):
        return evaluate(decision.yes if word & decision.bits else decision.no, data)
    return evaluate(dict(decision.cases).get(word & ~decision.ignoring, decision.default), data)


SMALL = st.integers(0, 6) | st.sampled_from([2**31, 2**32 - 2, 2**32 - 1])


def deeper(decisions):
    word = st.integers(0, 5).flatmap(lambda i: st.sampled_from([seccomp.low(i), seccomp.high(i)]))
    table = st.dictionaries(SMALL, decisions, max_size=5).map(lambda d: tuple(d.items()))
    return st.builds(seccomp.Switch, word, table, decisions, SMALL) | st.builds(
        seccomp.AnyBit, word, SMALL, decisions, decisions
    )


@given(
    decision=st.recursive(st.integers(0, 9), deeper, max_leaves=12),
    values=st.lists(st.tuples(SMALL, SMALL), min_size=6, max_size=6),
)
def test_instructions_decide_as_the_decision_says(decision, values):
    arguments = [low | high << 32 for low, high in values]
    code = b"".join(struct.pack("=HBBI", *i) for i in seccomp._assemble(decision))
    data = struct.pack("<IIQ6Q", 0, 0, 0, *arguments)
    assert run_filter(code, 0, arguments) == evaluate(decision, data)


# ---- calls whose arguments decide ----------------------------------------------------------------

THREAD = 0x3D0F00  # what pthread_create passes
FORK, SPAWN = 0x01200011, 0x4111
GARBAGE = 0xABCD << 32  # the kernel reads the lower half of an int


@both_machines
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("clone", (THREAD,), ALLOW),
        ("clone", (FORK,), ALLOW),
        ("clone", (SPAWN,), ALLOW),
        *[("clone", (FORK | 1 << bit,), EPERM) for bit in (7, 13, 15, 17, 25, 26, 27, 28, 29, 30)],
        ("clone", (FORK | 1 << 32,), EPERM),
        ("clone", (FORK | 1 << 33,), EPERM),
        ("socketpair", (1, 1), ALLOW),
        ("socketpair", (1, 1 | 0x800 | 0x80000), ALLOW),
        ("socketpair", (1 | GARBAGE, 1 | GARBAGE), ALLOW),
        ("socketpair", (1, 2), EPERM),
        ("socketpair", (1, 5), EPERM),
        ("socketpair", (2, 1), EPERM),
        ("socketpair", (16, 3), EPERM),
        ("setsockopt", (3, 1, 7), ALLOW),
        ("setsockopt", (3, 1, 26), EPERM),  # SO_ATTACH_FILTER
        ("setsockopt", (3, 6, 7), EPERM),
        ("sendto", (3, 0, 1, 0, 0, 0), ALLOW),
        ("sendto", (3, 0, 1, 0, 0x7FFF0010, 16), EPERM),
        ("sendto", (3, 0, 1, 0, 1 << 32, 16), EPERM),
        ("sendto", (3, 0, 1, 1, 0, 0), EPERM),
        ("recvfrom", (3, 0, 1, 0x40), ALLOW),
        ("recvfrom", (3, 0, 1, 1), EPERM),
        ("sendmsg", (3, 0, 0), ALLOW),
        ("sendmsg", (3, 0, 1), EPERM),
        ("recvmsg", (3, 0, 1), EPERM),
        ("prctl", (15,), ALLOW),
        ("prctl", (0x53564D41,), ALLOW),
        ("prctl", (1,), EPERM),  # the end with the parent
        ("prctl", (4,), EPERM),
        ("prctl", (22,), EPERM),
        ("prctl", (0x59616D61,), EPERM),
        ("ioctl", (1, 0x5401), ALLOW),
        ("ioctl", (1, 0x5413), ALLOW),
        ("ioctl", (1, 0x802C542A), ALLOW),
        ("ioctl", (1, 0x5421 | GARBAGE), ALLOW),
        ("ioctl", (1, 0x5412), EPERM),
        ("ioctl", (1, 0x5412 | GARBAGE), EPERM),
        ("ioctl", (1, 0x541C), EPERM),
        ("ioctl", (1, 0x8901), refuse(errno.ENOTTY)),  # FIOSETOWN
        ("ioctl", (1, 0x5402), refuse(errno.ENOTTY)),
        ("ioctl", (1, 0x40049409), refuse(errno.EOPNOTSUPP)),
        ("fcntl", (1, 1030), ALLOW),
        ("fcntl", (1, 6), ALLOW),
        *[("fcntl", (1, command), EPERM) for command in (8, 10, 15, 1024, 1026, 1033)],
        ("personality", (0xFFFFFFFF,), ALLOW),
        ("personality", (0x0040000,), EPERM),
        ("personality", (0,), EPERM),
        ("prlimit64", (0,), ALLOW),
        ("prlimit64", (OWN,), EPERM),
        ("setpriority", (0, 0), ALLOW),
        ("setpriority", (2, 0), EPERM),
        ("openat", (0, 0, 0o100, 0o644), ALLOW),
        ("openat", (0, 0, 0o100, 0o4755), EPERM),
        ("openat", (0, 0, 0o101, 0o2755 | GARBAGE), EPERM),
        ("openat", (0, 0, 0o20000000, 0o4755), EPERM),
        ("openat", (0, 0, 0o2, 0o6755), ALLOW),  # what lies in the register, not a mode
        ("fchmod", (3, 0o1777), ALLOW),
        ("fchmod", (3, 0o4755), EPERM),
        ("fchmodat", (3, 0, 0o2755), EPERM),
        ("fchmodat2", (3, 0, 0o2755), EPERM),
        ("fchmodat2", (3, 0, 0o755), ALLOW),
        ("kill", (OWN, 9), ALLOW),
        ("pidfd_open", (OWN,), ALLOW),
        ("pidfd_send_signal", (3, 9), ALLOW),
        ("sched_setaffinity", (OWN,), ALLOW),
    ],
)
def test_arguments(machine, name, arguments, expected):
    assert fate(machine, name, *arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("open", (0, 0o102, 0o600), ALLOW),
        ("open", (0, 0o102, 0o4600), EPERM),
        ("open", (0, 0, 0o4600), ALLOW),
        ("creat", (0, 0o4600), EPERM),
        ("creat", (0, 0o600), ALLOW),
        ("chmod", (0, 0o4600), EPERM),
        ("chmod", (0, 0o600), ALLOW),
        ("arch_prctl", (0x1002,), ALLOW),
        ("arch_prctl", (0x2001,), EPERM),
        ("fork", (), ALLOW),
        ("vfork", (), ALLOW),
    ],
)
def test_arguments_of_calls_of_x86_64_alone(name, arguments, expected):
    assert fate("x86_64", name, *arguments) == expected


@both_machines
def test_without_processes_only_threads_start(machine):
    assert fate(machine, "clone", THREAD, processes=False) == ALLOW
    for flags in (FORK, SPAWN, 0x11, 0, THREAD | 1 << 17, THREAD | 1 << 32):
        assert fate(machine, "clone", flags, processes=False) == EPERM
    for name in {"fork", "vfork"} & set(NUMBERS[machine]):
        assert fate(machine, name, processes=False) == EPERM
    assert fate(machine, "execve", processes=False) == ALLOW


@both_machines
@pytest.mark.parametrize(
    "name", ["kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open"]
)
def test_signals_reach_the_process_itself_alone(machine, name):
    assert fate(machine, name, OWN, own_pid=OWN) == ALLOW
    assert fate(machine, name, OWN | GARBAGE, own_pid=OWN) == ALLOW
    for pid in (0, 1, OWN - 1, OWN + 1, 2**32 - OWN, 2**64 - OWN, 2**64 - 1):
        assert fate(machine, name, pid, own_pid=OWN) == EPERM
        assert fate(machine, name, pid) == ALLOW


@both_machines
def test_other_processes_keep_their_limits(machine):
    for pid, expected in ((0, ALLOW), (OWN, ALLOW), (1, EPERM), (OWN + 1, EPERM)):
        assert fate(machine, "prlimit64", pid, own_pid=OWN) == expected
        assert fate(machine, "sched_setaffinity", pid, own_pid=OWN) == expected
        assert fate(machine, "setpriority", 0, pid, own_pid=OWN) == expected
    assert fate(machine, "pidfd_send_signal", 3, 9, own_pid=OWN) == EPERM


@both_machines
def test_modes_and_times_of_files_can_be_locked(machine):
    for name in METADATA & set(NUMBERS[machine]):
        assert fate(machine, name, metadata=False) == EPERM
        assert fate(machine, name) == ALLOW
