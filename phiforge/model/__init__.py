"""The Phi decoder, its tokenizer, and Hugging Face folders in and out.

Import from the files: `phiforge.model.{config,phi,rope,tokenizer,huggingface}`; the package itself
imports nothing, so that reading a configuration needs no torch. It writes nothing.
"""
