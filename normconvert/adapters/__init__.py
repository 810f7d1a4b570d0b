"""A PEFT adapter of the original in, the same adapter for the converted checkpoint out: complete or not at all.

`conversion` is the stage; `adapter_files` reads and names what an adapter holds, `low_rank` carries a plan's edits over
to the factors of LoRA and DoRA, `changes` does so for all of an adapter, `dependence` says which edits read what
the adapter changes, `prompts` is about virtual tokens, `merging` puts an adapter into a model for the verification,
`request` is what a user may ask. Nothing here makes a plan or knows a model family: what is done is what the converted
folder's record says. PEFT itself is not needed.
"""
