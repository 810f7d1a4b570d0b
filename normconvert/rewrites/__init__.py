"""One file a conversion: a graph and what the user allows in, a plan and a verdict for every norm out.

`rmsnorm`, `crmsnorm` and `fuse_bn` register themselves in `registry`, `planning` asks them and has the plan proved.
`centring`, `writers`, `readers`, `fold`, `regions`, `sizes`, `verdicts` are what the changes of basis share, `moving`,
`linear_maps` and `clipping` what the affine norms need. `comparison` holds the graph of the edited model
(`edited_trace`) against the original's and the plan's `expected_changes`, `claims` the plan's edits of tensors. A new
conversion is a new file here. Nothing here reads a weight or names a model: a plan is data.
"""
