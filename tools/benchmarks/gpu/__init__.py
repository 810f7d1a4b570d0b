"""All rows that need a GPU, in one command.

    python -m tools.benchmarks.gpu --minutes 8 --write           # measure, and write the pages
    python -m tools.benchmarks.gpu --plan                        # the rows in their order, with estimated seconds
    python -m tools.benchmarks.gpu --merge FILE                  # write the pages from a file measured elsewhere
    python -m tools.benchmarks.gpu --small --device cpu          # every code path, with toys, in a minute

The checks come first, then the groups by priority. A row is one cell: versions of one model, or kernels, that take
turns in this process (:mod:`normconvert.benchmark`). It is written as soon as it is measured; what fails or what there
is no time for is a row that says so. Models are made on the device from configurations, with random weights.

The product of models, workloads, batches, dtypes and modes has more than four hundred cells, of which eight minutes
take some seventy. What was chosen, each in the file of its group:

- bfloat16 throughout, and float16 where it could differ most: the smallest models, which are bound by their norms
  and launches rather than by products.
- Decoding mostly in CUDA graphs, as engines run it: eagerly, one token is a measurement of Python.
- The longest prompts eagerly: their kernels fill the GPU, and a graph changes nothing.
- Compiled, one workload for each of two models, since four versions take a minute to compile.
- What is left of the product comes last (``--minutes 20``).
"""
