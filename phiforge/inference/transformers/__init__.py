"""Any causal language model of `transformers` as a generator, on token ids.

`TransformersModel(model, tokenizer)` or `TransformersModel.from_folder(path)`; `wrap_tokenizer`
makes a PromptTokenizer of any tokenizer. Needs the extra [transformers]. Nothing is written.
"""

from phiforge.inference.transformers.model import TransformersModel
from phiforge.inference.transformers.tokenizer import wrap_tokenizer

__all__ = ["TransformersModel", "wrap_tokenizer"]
