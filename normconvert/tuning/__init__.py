"""Replacing norms by ones with fixed statistics, which must be learnt: calibration, distillation, and the norms."""
