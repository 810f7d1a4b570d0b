"""Broken and hostile input, thousands of it: what comes of each is a result or one clear error.

`mutations` makes it of good files, `kills` ends commands at random moments.
"""
