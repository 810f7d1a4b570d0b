"""A model on the meta device in, a graph of pure ATen operations out; no weight is read.

`graph` exports one call and marks module boundaries, `probes` guesses what inputs a model takes, `model_graph` merges
the calls that it takes to read all parameters. `pretend_cpu`, `known_values`, `constant_buffers`, `in_place_writes` and
`model_caches` let real model code run without values and undo what it remembers; `garbage` makes it quick. A new kind
of input is a row of `probes.builders`. Nothing here knows what a norm or a stream is.
"""
