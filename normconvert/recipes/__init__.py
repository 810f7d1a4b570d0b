"""Recipes: many conversions in one YAML file, run on this machine or on a cluster.

reading.py  model.py     a YAML file -> a checked recipe, every entry of which knows its line
expansion.py origins.py  recipes -> jobs: sources looked up, patterns and names filled in, clashes found
state.py fingerprint.py  what is there already -> what is to be done with each job
local.py worker.py       jobs -> events, in processes of this machine
ray_executor.py          jobs -> events, on a Ray cluster
work.py claim.py storage.py  one job, wherever it runs
batch.py table.py        all of it from beginning to end, and on the screen
"""

from __future__ import annotations
