"""Plan x checkpoint files in, checkpoint files out: streaming, complete or not at all.

`checkpoint` is the stage; `layout` decides which tensor goes into which file, `source_reader`, `scan` and
`scan_process` read, hash and copy while the model is traced, `writer` and `blocks` edit one tensor at a time,
`loaded_model` is the way for libraries that merge tensors on loading, `output_folder` makes the folder appear at once,
`shard_stream` does it shard by shard for the hub, `record` and `model_card` say what was done. Nothing here knows what
a norm is: it does the arithmetic that the plan names.
"""
