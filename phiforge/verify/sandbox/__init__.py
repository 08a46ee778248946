"""Runs code that a model wrote, contained by the kernel, without docker or other services.

`Sandbox().run({"kind": "program", "source": "print(1)"})` gives an Outcome.
"""

from phiforge.verify.sandbox.layers import Layers
from phiforge.verify.sandbox.limits import Limits
from phiforge.verify.sandbox.sandbox import Outcome, Sandbox, SandboxUnavailable

__all__ = ["Layers", "Limits", "Outcome", "Sandbox", "SandboxUnavailable"]
