"""Evaluation: asks checkpoints questions, keeps every transcript, scores with intervals.

`phiforge.evals.run.run` is the stage; `prompts`, `ask`, `longcontext`, `bits` and `scores` are its
steps, usable alone on a model and a list of Problems.
"""
