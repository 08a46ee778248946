"""Sandlock's own way of running programs: `sandlock.Sandbox(...).run([python, "-c", program])`.

Started by `phiforge bench sandbox` on the peer's Python; see protocol.py. Writes into the folder of
each run alone.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import protocol
import sandlock


class Runner:
    """The interpreter and the paths that it needs, as the benchmark names them."""

    def __init__(self, settings):
        self.python, self.readable = settings["python"], settings["readable"]
        self.writable, self.folder = settings["writable"], settings["folder"]
        self.memory_bytes, self.processes = settings["memory_bytes"], settings["num_processes"]
        self.about = {"sandlock": sandlock.__version__, "python": sys.version.split()[0]}

    def one(self, program):
        """What a program wrote. Limits as far as sandlock has them."""
        sandbox = sandlock.Sandbox(
            fs_readable=self.readable,
            fs_writable=[self.folder, *self.writable],
            cwd=self.folder,
            clean_env=True,
            max_memory=self.memory_bytes,
            max_processes=self.processes,
        )
        return sandbox.run([*self.python, program], timeout=20.0).stdout.decode()

    def run(self, request):
        """All programs of a round, some at a time."""
        started = time.perf_counter()
        with ThreadPoolExecutor(request["workers"]) as pool:
            outputs = list(pool.map(self.one, request["programs"]))
        return {"seconds": time.perf_counter() - started, "outputs": outputs}


if __name__ == "__main__":
    protocol.serve(Runner, Runner.run)
