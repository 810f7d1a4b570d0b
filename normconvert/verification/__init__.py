"""Two models, or a folder and its record, in; figures and a verdict out: do they compute the same?

`equivalence` is the stage (algebra, rounding, use), `fidelity` its figures, `limits` what a user holds them to,
`probe_runs` runs a model on probes, `run_comparison` lays two runs side by side, `divergence` and `layer_measures` look
inside, `lazy_weights` and `lazy_models` do it in little memory, `record_check` and `folder_comparison` are
``normconvert check``, `running_statistics` looks at values before they are folded. A new check goes here. Nothing here
decides what is converted.

The room is not called ``verify``, since a package of that name would take the place of the function
``normconvert.verify`` as soon as anything of it is imported.
"""
