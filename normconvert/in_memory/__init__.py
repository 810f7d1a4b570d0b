"""Models in memory: a module and how it is called -> the same stages as for files, and an edited module.

`subject` checks a model and takes its skeleton, `editing` puts a plan's edits into it as a whole or not at all,
`conversion` is the public function, `caches` forgets what modules worked out from their weights.
"""
