"""System calls of Linux by name: their numbers on both machines, and which ones programs may use.

`NUMBERS["x86_64"]["openat"]` is 257. `ALLOWED` pass, `REFUSED` fail with EPERM; calls whose
arguments decide lie in `seccomp.py`; calls named nowhere fail with ENOSYS. Nothing is written.
"""

from __future__ import annotations

# A number, then the names that count on from it. Sources: arch/x86/entry/syscalls/syscall_64.tbl
# and include/uapi/asm-generic/unistd.h (which is aarch64's) of Linux 6.17. The machines share every
# number from 424 on.
_X86_64 = """
0 read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction
rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield
mremap msync mincore madvise shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm
setitimer getpid sendfile socket connect accept sendto recvfrom sendmsg recvmsg shutdown bind
listen getsockname getpeername socketpair setsockopt getsockopt clone fork vfork execve exit wait4
kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock fsync fdatasync
truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink
readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times
ptrace getuid syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid
setregid getgroups setgroups setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid
getsid capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime
mknod uselib personality ustat statfs fstatfs sysfs getpriority setpriority sched_setparam
sched_getparam sched_setscheduler sched_getscheduler sched_get_priority_max sched_get_priority_min
sched_rr_get_interval mlock munlock mlockall munlockall vhangup modify_ldt pivot_root _sysctl
prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2 swapon swapoff
reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security
gettid readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr
flistxattr removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity
sched_getaffinity set_thread_area io_setup io_destroy io_getevents io_submit io_cancel
get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old remap_file_pages
getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create timer_settime
timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy
get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load
waitid add_key request_key keyctl ioprio_set ioprio_get inotify_init inotify_add_watch
inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat newfstatat unlinkat
renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list
get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait signalfd
timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg
fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs
sendmmsg setns getcpu process_vm_readv process_vm_writev kcmp finit_module sched_setattr
sched_getattr renameat2 seccomp getrandom memfd_create kexec_file_load bpf execveat userfaultfd
membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx
io_pgetevents rseq
"""

_AARCH64 = """
0 io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr
lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd
lookup_dcookie eventfd2 epoll_create1 epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1
inotify_add_watch inotify_rm_watch ioctl ioprio_set ioprio_get flock mknodat mkdirat unlinkat
symlinkat linkat renameat umount2 mount pivot_root nfsservctl statfs fstatfs truncate ftruncate
fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat fchown openat close vhangup pipe2
quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv pwritev sendfile
pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat fstat sync fsync fdatasync
sync_file_range timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset
personality exit exit_group waitid set_tid_address unshare futex set_robust_list get_robust_list
nanosleep getitimer setitimer kexec_load init_module delete_module timer_create timer_gettime
timer_getoverrun timer_settime timer_delete clock_settime clock_gettime clock_getres
clock_nanosleep syslog ptrace sched_setparam sched_setscheduler sched_getscheduler sched_getparam
sched_setaffinity sched_getaffinity sched_yield sched_get_priority_max sched_get_priority_min
sched_rr_get_interval restart_syscall kill tkill tgkill sigaltstack rt_sigsuspend rt_sigaction
rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority
reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid
times setpgid getpgid getsid setsid getgroups setgroups uname sethostname setdomainname getrlimit
setrlimit getrusage umask prctl getcpu gettimeofday settimeofday adjtimex getpid getppid getuid
geteuid getgid getegid gettid sysinfo mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify
mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl semtimedop semop shmget shmctl shmat shmdt
socket socketpair bind listen accept connect getsockname getpeername sendto recvfrom setsockopt
getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key keyctl clone
execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore
madvise remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages
rt_tgsigqueueinfo perf_event_open accept4 recvmmsg
260 wait4 prlimit64 fanotify_init fanotify_mark name_to_handle_at open_by_handle_at clock_adjtime
syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp finit_module sched_setattr
sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd membarrier mlock2
copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq
kexec_file_load
"""

_BOTH = """
424 pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen
fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2
process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule
landlock_restrict_self memfd_secret process_mrelease futex_waitv set_mempolicy_home_node cachestat
fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount
lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat
removexattrat open_tree_attr file_getattr file_setattr
"""


def _numbers(text: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    number = 0
    for word in text.split():
        if word.isdigit():
            number = int(word)
        else:
            numbers[word] = number
            number += 1
    return numbers


NUMBERS = {
    "x86_64": _numbers(_X86_64 + _BOTH),
    "aarch64": _numbers(_AARCH64 + _BOTH),
}

_FILES = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
dup dup2 dup3 pipe pipe2 sendfile copy_file_range flock fsync fdatasync fallocate fadvise64
readahead truncate ftruncate stat fstat lstat newfstatat statx access faccessat faccessat2
readlink readlinkat statfs fstatfs getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir
unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat umask utime utimes
futimesat utimensat getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
"""
_MEMORY = """
mmap munmap mremap mprotect madvise msync mincore brk mlock mlock2 munlock mlockall munlockall
membarrier get_mempolicy
"""
_THREADS = """
futex set_robust_list set_tid_address rseq restart_syscall getcpu sched_yield sched_getaffinity
sched_getparam sched_getscheduler sched_getattr sched_get_priority_max sched_get_priority_min
sched_rr_get_interval
"""
_SIGNALS = """
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
signalfd signalfd4 pause
"""
_TIME = """
time times gettimeofday clock_gettime clock_getres nanosleep clock_nanosleep alarm getitimer
setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete timerfd_create
timerfd_settime timerfd_gettime
"""
_WAITING = """
select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
epoll_pwait2 eventfd eventfd2
"""
# execve also where new processes are refused: a process may become another one, under this filter.
_PROCESSES = """
execve exit exit_group wait4 waitid getpid getppid gettid getpgid getpgrp setpgid getsid setsid
getpriority getuid geteuid getgid getegid getresuid getresgid getgroups getrlimit setrlimit
getrusage capget uname sysinfo getrandom
"""
# Of sockets only connected pairs exist (`socketpair` in seccomp.py): asyncio wakes itself by one.
_SOCKET_PAIRS = "getsockname getpeername getsockopt shutdown"

ALLOWED = frozenset(
    " ".join(
        (_FILES, _MEMORY, _THREADS, _SIGNALS, _TIME, _WAITING, _PROCESSES, _SOCKET_PAIRS)
    ).split()
)

# Allowed in a tree of one's own; Landlock alone would let them reach files outside.
METADATA = frozenset(
    """
    chmod fchmod fchmodat fchmodat2 utime utimes futimesat utimensat truncate
    """.split()
)

_NETWORK = "socket connect bind listen accept accept4 sendmmsg recvmmsg"
# Reading, writing or stopping other processes, or taking their descriptors.
_OTHER_PROCESSES = """
ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd
migrate_pages move_pages
"""
_FILE_SYSTEMS = """
mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick
mount_setattr swapon swapoff quotactl quotactl_fd acct fanotify_init fanotify_mark
"""
# Handles name files without a path, hence around the tree that programs see.
_FILES_PAST_THE_TREE = "name_to_handle_at open_by_handle_at"
_NAMESPACES = "unshare setns sethostname setdomainname"
# Large parts of the kernel with a long record of holes, and of no use to these programs.
_KERNEL_SURFACE = """
bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key
request_key vmsplice modify_ldt
"""
# A file without a name could be executed, or kept out of the disk limit.
_NAMELESS_FILES = "memfd_create memfd_secret execveat"
# Memory and queues that outlive their process and count against none of its limits.
_SYSTEM_V_AND_QUEUES = """
shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open
mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
"""
# Devices; and pipes with a name, on which whoever looks at the folder from outside would wait.
_NODES = "mknod mknodat"
# Attributes would be space outside the disk limit; shutil passes over EPERM here.
_ATTRIBUTES = """
setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
file_setattr
"""
_IDENTITY = """
setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
chown fchown lchown fchownat
"""
_PRIORITY = "sched_setparam sched_setscheduler sched_setattr ioprio_set"
_MACHINE = """
reboot kexec_load kexec_file_load init_module finit_module delete_module iopl ioperm syslog
vhangup settimeofday clock_settime adjtimex clock_adjtime
"""
# The walls themselves.
_WALLS = """
seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self lsm_set_self_attr
"""

REFUSED = frozenset(
    " ".join(
        (
            _NETWORK,
            _OTHER_PROCESSES,
            _FILE_SYSTEMS,
            _FILES_PAST_THE_TREE,
            _NAMESPACES,
            _KERNEL_SURFACE,
            _NAMELESS_FILES,
            _SYSTEM_V_AND_QUEUES,
            _NODES,
            _ATTRIBUTES,
            _IDENTITY,
            _PRIORITY,
            _MACHINE,
            _WALLS,
        )
    ).split()
)
