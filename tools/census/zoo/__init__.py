"""The model zoo of the coverage sweep: every model of the installed libraries, made small."""

from tools.census.zoo.case import Case, Skipped, is_batchnorm, is_layernorm

__all__ = ["Case", "Skipped", "is_batchnorm", "is_layernorm"]
