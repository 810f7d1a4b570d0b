"""Paths in, names, dtypes, shapes and bytes out: reading weight files, indexes and YAML without trusting them.

`weight_files` finds and checks the weights of a folder, `safetensors_file` and `pickle_file` read one file
each. A new file format goes here. Nothing here knows an architecture, a library or what is to be converted, and
nothing that is read is run.
"""
