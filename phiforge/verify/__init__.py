"""Checks answers: `is_correct(problem, response)` is the oracle of exact problems.

An oracle is a callable (Problem, response text) -> bool; it raises OracleError when it cannot tell.
"""

from phiforge.verify.answers import OracleError, extract_answer, is_correct, is_refusal

__all__ = ["OracleError", "extract_answer", "is_correct", "is_refusal"]
