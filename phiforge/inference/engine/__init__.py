"""The engine: samples and scores with a Phi model, batched, cached and reproducible.

`Engine(model, tokenizer).generate(prompts, n=4)`; `score(prompts, completions)`; `submit(request)`
streams one answer. Nothing is written.
"""

from phiforge.inference.engine.constrain import allow_only, forbid_first
from phiforge.inference.engine.engine import Engine
from phiforge.inference.engine.sample import NonFiniteLogits
from phiforge.inference.engine.stream import Stream, Token

__all__ = ["Engine", "NonFiniteLogits", "Stream", "Token", "allow_only", "forbid_first"]
