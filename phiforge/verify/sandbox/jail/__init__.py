"""The jailer's side of the sandbox: standard library only, relative imports only.

It runs in a process of its own (`server.py`), as the top-level package `jail`, in any Python 3.11+.
"""
