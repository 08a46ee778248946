"""Ways to talk to a model: the OpenAI-compatible server and the terminal.

`phiforge serve runs/nano-s0`, `phiforge chat runs/nano-s0`. Nothing is written.
"""
