"""What runs inside a peer's own environment, where phiforge cannot be imported.

`NAME.txt` lists what pip installs there; `run_*.py` are plain scripts that speak `protocol`.
"""
