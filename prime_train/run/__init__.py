"""One run: its directory, its checkpoints, and how it starts and stops.

`setup` makes models and processes from a configuration; `directory` is where everything that a run leaves lies;
`checkpoints` are written while training goes on, `saved` knows their files; `interrupt` hears Ctrl-C and SIGTERM;
`export` turns a checkpoint into a model for others. How models are trained is not known here.

May import: config, data, models.
"""
