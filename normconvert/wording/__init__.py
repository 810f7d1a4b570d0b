"""Data in, words out: figures as people read them, and rows that differ only in layer numbers told as one.

Used wherever a sentence is made, from a refusal to the HTML report. Nothing here prints, and nothing here knows a
model, a plan or a file.
"""
