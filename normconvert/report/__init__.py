"""Results in, what a person or a program sees out: the terminal, the JSON document, HTML, JUnit, Markdown, annotations.

`screen` is where a running command prints, `document` the JSON that every other form is made from, `console`, `html`,
`markdown`, `junit` and `github` one form each. A new form goes here. Nothing here computes a figure or touches a
checkpoint.
"""
