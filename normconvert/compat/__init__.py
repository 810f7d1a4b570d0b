"""What this package uses of other libraries beside what they promise, one file a library.

`private_names` says what a name is for and raises the error for one that has gone; `torch`, `transformers` and `timm`
have a table of names and the few functions that use them; `lean_export` keeps torch from work that no trace needs. No
other file may name a private part of those libraries. What `runtime/` uses of them is in the tables as well, though it
stands on its own and gets by without.
"""
