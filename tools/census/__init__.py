"""Censuses: what the package does with many models at once, in figures that two versions of it can be compared by."""
