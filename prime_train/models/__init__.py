"""A language model as every stage uses it, on one process or many.

`language_model` is a transformer with a head that gives log-probs instead of logits; `distributed` the processes, and
the only one that knows how they talk; `packing` lays sequences out in micro-batches; `optim` steps; `generation`
bounds what sampling holds; `served` and `snapshot` are the weights as servers and files get them. Nothing here knows
what a reward or a configuration is.

May import: records.
"""
