"""What to do with a checkpoint, as plain data, and the one place that gives the data a meaning.

`conversion_plan` is the plan (JSON), `edits` the arithmetic on a tensor that it may ask for, `vectors` the expressions
of stored tensors that edits are made of, `conversion_record` what an earlier conversion wrote about itself. A new edit
goes into the table of `edits`. Nothing here holds code, a module or a model.
"""
