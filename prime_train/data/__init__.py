"""Rows to prompts and demonstrations.

`prompts` reads every supported form of a row and hands prompts out in an order that a seed fixes; `arithmetic` is the
generated task, with its tokenizer. What a row must look like is decided here. What an answer is worth is not: that is
`verify`'s, of which this room knows only where an answer's text is found.

May import: config, records, verify.
"""
