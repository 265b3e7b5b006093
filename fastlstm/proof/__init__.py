"""Proving kernels right, and finding the fast ones, on the machine of the user."""

from fastlstm.proof import checking as checking
from fastlstm.proof.tuning import tune
from fastlstm.proof.verification import verify

__all__ = ["tune", "verify"]
