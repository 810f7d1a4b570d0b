"""Recipes: many conversions in one YAML file in, finished outputs and a table of them out, on one machine or a cluster.

reading.py  model.py     a YAML file -> a checked recipe, every entry of which knows its line
expansion.py origins.py  recipes -> jobs: sources looked up, patterns and names filled in, clashes found
state.py fingerprint.py  what is there already -> what is to be done with each job
local.py worker.py       jobs -> events, in processes of this machine
ray_executor.py          jobs -> events, on a Ray cluster
work.py claim.py storage.py  one job, wherever it runs
batch.py table.py        all of it from beginning to end, and on the screen

A job is one call of the Python API: nothing here knows how a conversion is made.
"""

from __future__ import annotations
