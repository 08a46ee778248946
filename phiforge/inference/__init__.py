"""Generation and scoring: one interface, and the engines behind it.

`phiforge.inference.interface` names what every generator does; `phiforge.inference.engine.Engine`
is our own. Nothing is written.
"""
