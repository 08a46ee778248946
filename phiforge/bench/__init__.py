"""Side-by-side measurements: phiforge and each peer, same weights, same work, one machine, one run.

`phiforge bench engine | train` from the shell, `run(plan)` of `bench.run` from Python. Every
contestant is a process of its own behind a pipe, so that they take turns and one works at a time.
"""
