"""phiforge: everything that makes a small language model that reasons, in one recipe.

`phiforge.load`, `save`, `Phi`, `PhiConfig`, `Engine`, `Problem`, `pivotal` and `run` load on first
use, so that `import phiforge` stays fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "phiforge.model.huggingface:load",
    "save": "phiforge.model.huggingface:save",
    "Phi": "phiforge.model.phi:Phi",
    "PhiConfig": "phiforge.model.config:PhiConfig",
    "Tokenizer": "phiforge.model.tokenizer:Tokenizer",
    "Engine": "phiforge.inference.engine:Engine",
    "Completion": "phiforge.inference.interface:Completion",
    "Problem": "phiforge.core.records:Problem",
    "pivotal": "phiforge.posttrain.pivotal",
    "run": "phiforge.recipe:run",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from phiforge.core.records import Problem as Problem
    from phiforge.inference.engine import Engine as Engine
    from phiforge.inference.interface import Completion as Completion
    from phiforge.model.config import PhiConfig as PhiConfig
    from phiforge.model.huggingface import load as load
    from phiforge.model.huggingface import save as save
    from phiforge.model.phi import Phi as Phi
    from phiforge.model.tokenizer import Tokenizer as Tokenizer
    from phiforge.posttrain import pivotal as pivotal
    from phiforge.recipe import run as run


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'phiforge' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = import_module(module)
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted(__all__)
