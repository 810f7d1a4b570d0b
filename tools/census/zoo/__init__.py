"""The model zoo of the coverage sweep: every model of the installed libraries, made small.

A `case` is one model with how it is built; `probing` finds what the values of a configuration do to a checkpoint.
"""

from tools.census.zoo.case import Case, Skipped, is_batchnorm, is_layernorm

__all__ = ["Case", "Skipped", "is_batchnorm", "is_layernorm"]
