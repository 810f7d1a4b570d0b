"""Models and workloads in, times and memory out: a model beside its conversion and beside itself without its norms.

`bench` is the command's work; `workloads` says what is asked of a model, `versions` and `bound` which models are timed,
`timing`, `steps` and `memory` how, `result` holds the rows. A new workload or mode goes here. Nothing here
knows how a conversion is made, and nothing prints.
"""
