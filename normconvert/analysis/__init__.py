"""Graph in, facts out: which values carry channels where, which operations let them pass, which norms there are.

`channel_axes` says where a value has its channels, `axis_rules` and `moving_rules` describe an operation as sums of
products, `op_table` has one line for each ATen operation: a new operation goes there. `streams` grows the maximal sets
of values around a norm, `norms` and `affine_norms` (by `affine_forms`) recognise norms by their algebra,
`parallel_branches` finds branches that are one convolution. Nothing here knows a model family, a checkpoint file, or
what will be done with a fact: an operation without a rule is a leak as a reader and opaque as a writer.
"""
