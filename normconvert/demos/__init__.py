"""``normconvert demo``: the embedded models and what is shown with them.

`run` converts each, verifies it, and lets the original and the conversion do the same work side by side. The folders
beside it are ordinary checkpoints, made by ``tools/demos/train_demos.py``; where they lie is for
`normconvert.files.embedded` to say.
"""
