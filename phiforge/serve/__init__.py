"""Ways to talk to a model: so far the terminal.

`phiforge.serve.terminal.chat("runs/nano-s0")`. Nothing is written.
"""
