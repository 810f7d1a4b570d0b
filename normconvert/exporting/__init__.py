"""A checkpoint in, one file out that runs without this package: ONNX, or a program of torch.export.

The room is not called ``export``, since a package of that name would take the place of the function
``normconvert.export`` as soon as anything of it is imported.
"""
