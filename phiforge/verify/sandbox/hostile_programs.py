"""Hostile programs that overuse what a run gives: time, memory, processes, output, the report.

`hostile.py` sends each function's text, after `hostile_prelude.py`, as a program. Every program is
bounded, so that it does little harm where it is not contained. They write lines of evidence.
"""

import ctypes
import os
import signal
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
    say,
    tried,
    write_everywhere,
)

# -- time ------------------------------------------------------------------------------------------


def infinite_loop():
    tried()
    while True:
        pass


def sleep():
    tried()
    time.sleep(600)
    escaped("slept for ten minutes")


def ignore_signals():
    every = set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}
    for number in every:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    signal.pthread_sigmask(signal.SIG_BLOCK, every)
    tried()
    time.sleep(600)
    escaped("ignored every signal and slept for ten minutes")


def catch_cpu_limit():
    for number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    tried()
    while True:
        pass


def stop_itself():
    tried()
    os.kill(os.getpid(), signal.SIGSTOP)
    escaped("somebody woke it")


def spin_in_many_processes():
    tried()
    for _ in range(8):
        try:
            if os.fork() == 0:
                break
        except OSError as error:
            held(error)
            break
    while True:
        pass


# -- memory ----------------------------------------------------------------------------------------


def allocate_at_once():
    def allocate():
        block = bytearray(1024 * MIB)
        block[::4096] = b"x" * len(block[::4096])
        return len(block)

    attempt("1 GB at once", allocate)


def allocate_endlessly():
    tried()
    blocks = []
    while len(blocks) < 2 * FACTS["memory_bytes"] // MIB:
        blocks.append(bytearray(os.urandom(1024)) * 1024)
    escaped(f"held {len(blocks)} MB in pieces")


def allocate_in_many_processes():
    def hold():
        block = bytearray(b"x") * (200 * MIB)
        os.write(ready[1], b"x")
        time.sleep(2)
        os.write(ready[1], b"y" if block else b"")

    ready = os.pipe()
    tried()
    children = 0
    for _ in range(8):
        try:
            fork_with(hold)
            children += 1
        except OSError as error:
            held(error)
            break
    os.close(ready[1])
    said = b""
    while part := os.read(ready[0], 64):
        said += part
    if said.count(b"y") * 200 * MIB > 1.5 * FACTS["memory_bytes"]:
        escaped(f"{said.count(b'y')} processes held 200 MB each for two seconds")


def memory_of_files_without_names():
    held_mib = 0
    try:
        for index in range(60):
            descriptor = os.memfd_create(f"piece{index}")
            for _ in range(FACTS["disk_bytes"] // MIB):
                held_mib += os.write(descriptor, b"x" * MIB) // MIB
    except (OSError, MemoryError) as error:
        held(f"memfd after {held_mib} MB: {error!r}")
    time.sleep(0.5)
    if held_mib * MIB > 4 * FACTS["disk_bytes"] and held_mib * MIB > FACTS["memory_bytes"] / 2:
        escaped(f"held {held_mib} MB in memfds")


def memory_of_system_v():
    held_mib = 0
    try:
        for _ in range(48):
            segment = call("shmget", 0, 16 * MIB, 0o1600)
            address = call("shmat", segment, 0, 0)
            ctypes.memset(address, 1, 16 * MIB)
            call("shmdt", address)
            held_mib += 16
    except (OSError, MemoryError) as error:
        held(f"shmget after {held_mib} MB: {error!r}")
    if held_mib * MIB > 1.2 * FACTS["memory_bytes"]:
        escaped(f"held {held_mib} MB in System V segments, attached nowhere")


def memory_of_dev_shm():
    written = 0
    tried()
    try:
        for index in range(60):
            with open(f"/dev/shm/{FACTS['marker']}-{index}", "wb", buffering=0) as file:
                written += file.write(b"x" * (FACTS["disk_bytes"] // 2))
    except (OSError, MemoryError) as error:
        held(f"/dev/shm after {written // MIB} MB: {error!r}")
    if written > 8 * FACTS["disk_bytes"]:
        escaped(f"wrote {written // MIB} MB below /dev/shm")


def memory_of_pipes():
    import fcntl

    pipes, total = [], 0
    try:
        while total < 1024 * MIB:
            pipes.append(os.pipe())
            size = fcntl.fcntl(pipes[-1][1], 1031, MIB)  # F_SETPIPE_SZ
            total += os.write(pipes[-1][1], b"x" * size)
    except (OSError, MemoryError) as error:
        held(f"pipes after {total // MIB} MB: {error!r}")
    if total > FACTS["memory_bytes"]:
        escaped(f"held {total // MIB} MB in pipes")


# -- processes -------------------------------------------------------------------------------------


def fork_bomb():
    # Each fork takes one of 300 tokens, so that the bomb is bounded where nothing holds it.
    tokens, births = os.pipe(), os.pipe()
    os.write(tokens[1], b"t" * 300)
    os.set_blocking(tokens[0], False)
    os.set_blocking(births[0], False)
    tried()
    end = time.monotonic() + 0.6
    first = os.getpid()
    while time.monotonic() < end:
        try:
            if os.read(tokens[0], 1) and os.fork() == 0:
                os.write(births[1], b"b")
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if os.getpid() == first:
                held(error)
            time.sleep(0.1)
    if os.getpid() != first:
        time.sleep(5)
        os._exit(0)
    try:
        born = len(os.read(births[0], 4096))
    except BlockingIOError:
        born = 0
    if born > 2 * FACTS["num_processes"]:
        escaped(f"{born} processes at once")


def thread_bomb():
    import threading

    stop = threading.Event()
    threading.stack_size(64 * 1024)
    started = 0
    tried()
    try:
        while started < 300:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except (RuntimeError, MemoryError) as error:
        held(f"after {started} threads: {error!r}")
    if started > 4 * FACTS["num_processes"]:
        escaped(f"{started} threads at once")


def daemon_that_outlives():
    def detach():
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 64)
            time.sleep(120)

    tried()
    os.waitpid(fork_with(detach), 0)


def daemon_that_keeps_the_output():
    tried()
    fork_with(lambda: (os.setsid(), time.sleep(120)))


def daemons_that_keep_forking():
    # A chain that is always one fork ahead of whoever kills it; 2000 links at most.
    tried()
    for link in range(2000):
        pid = os.fork()
        if pid:
            if link:
                os._exit(0)
            time.sleep(0.3)
            return
        os.setsid()
        time.sleep(0.005)


def run_other_programs():
    import subprocess

    reads = f"open({FACTS['secret_file']!r}).read()"
    for command in (
        [sys.executable, "-c", f"print({reads}) # {FACTS['marker']}"],
        ["/bin/sh", "-c", f"cat {FACTS['secret_file']} /etc/shadow /etc/passwd"],
        ["/bin/sh", "-c", f"echo changed > {FACTS['folder']}/canary.txt"],
        ["/usr/bin/env"],
        ["ps", "ax"],
        ["sudo", "-n", "id"],
        ["su", "-c", "id"],
        ["newuidmap", "1"],
        ["crontab", "-l"],
        ["systemd-run", "--user", "true"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, timeout=2, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            held(f"{command[0]}: {error!r}")
            continue
        if b"uid=0" in done.stdout:
            escaped(f"{command[0]} ran as root")
        say(f"HELD: {command[0]} ended with {done.returncode}: {done.stdout[:200]!r}")


def run_a_file_of_its_own():
    import subprocess

    # Whatever runs must be held as the program is: it tries to read the secret.
    script = f"#!{sys.executable}\nprint(open({FACTS['secret_file']!r}).read())\n"
    with open("own.py", "w") as file:
        file.write(script)
    attempt("set-user-id", os.chmod, "own.py", 0o4755)
    try:
        os.chmod("own.py", 0o755)
        done = subprocess.run(["./own.py"], capture_output=True, timeout=2, check=False)
        say(f"HELD: it ran and ended with {done.returncode}: {done.stdout[:200]!r}")
    except (OSError, subprocess.SubprocessError) as error:
        held(repr(error))


def run_a_file_in_memory():
    def become():
        arguments = [sys.executable, "-c", f"print(open({FACTS['secret_file']!r}).read())"]
        os.execve(descriptor, arguments, {})

    try:
        descriptor = os.memfd_create("program", 0)
        with open(os.path.realpath(sys.executable), "rb") as file:
            os.write(descriptor, file.read())
        os.waitpid(fork_with(become), 0)
        held("whatever ran is held too")
    except (OSError, MemoryError) as error:
        held(repr(error))


def crash_at_a_null_pointer():
    tried()
    ctypes.string_at(0)
    escaped("read address 0")


def overflow_the_stack():
    tried()
    sys.setrecursionlimit(2**31 - 1)
    nested = ()
    for _ in range(10**6):
        nested = (nested,)
    repr(nested)


def dump_core():
    import resource

    tried()
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != 1:
        escaped("at any limit but 1 the kernel may start a handler of crashes, as root")
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (2**20, 2**20))
        escaped("cores may be written")
    except (OSError, ValueError) as error:
        held(error)
    os.abort()


# -- output ----------------------------------------------------------------------------------------


def endless_stdout():
    tried()
    for _ in range(20_000):
        os.write(1, b"x" * 65536)
    escaped("wrote 1.3 GB")


def endless_stderr():
    tried()
    for _ in range(20_000):
        os.write(2, b"x" * 65536)
    escaped("wrote 1.3 GB")


def endless_report():
    tried()
    payload = b"[" * 65536
    for _ in range(5000):
        write_everywhere(payload)
    escaped("wrote 330 MB of report")


def forge_report():
    tried()
    write_everywhere(b'{"verdict": "pass", "exception": null}')
    os._exit(0)


def forge_half_a_report():
    tried()
    write_everywhere(b'{"exception": "Trunc')
    os._exit(0)


def forge_report_twice():
    tried()
    write_everywhere(b'{"exception": "forged"}')


def forge_deep_report():
    tried()
    write_everywhere(b"[" * 30_000 + b"]" * 30_000)
    os._exit(0)


def forge_report_of_no_number():
    tried()
    write_everywhere(b'{"exception": NaN, "errno": -Infinity, "x": 1e999}')
    os._exit(0)


def forge_report_of_a_huge_number():
    tried()
    write_everywhere(b"9" * 60_000)
    os._exit(0)


def forge_report_of_no_text():
    tried()
    write_everywhere(b'{"exception": "\xff\xfe\xc0\x80\xed\xa0\x80\\ud800"}\x00')
    os._exit(0)


def forge_long_report():
    tried()
    write_everywhere(b'{"exception": "' + b"x" * MIB + b'"}')
    os._exit(0)


def output_of_no_text():
    tried()
    for descriptor in (1, 2):
        os.write(descriptor, b"\xff\xfe\x00\x1b[2J\x1b]0;title\x07\xed\xa0\x80\n" * 10)


def close_every_descriptor():
    tried()
    os.closerange(0, 4096)
    time.sleep(600)


def replace_streams():
    class Stream:
        def write(self, text):
            raise KeyboardInterrupt(text)

        def flush(self):
            raise SystemExit(0)

        def __getattr__(self, name):
            raise RuntimeError(name)

    tried()
    sys.stdout = sys.stderr = sys.stdin = sys.__stdout__ = sys.__stderr__ = Stream()
    raise BaseException("nobody can print this")


def patch_the_interpreter():
    import builtins
    import json

    tried()
    setattr(builtins, "phiforge_poison", True)  # noqa: B010

    def refuse(*_, **__):
        raise MemoryError("patched")

    json.dumps = json.loads = os.write = refuse
    builtins.open = builtins.print = builtins.len = builtins.isinstance = refuse
    sys.modules.clear()
    sys.path.clear()
    os._exit = refuse
