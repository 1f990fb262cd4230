"""Every key of a run, and how a configuration is read.

`keys` has one frozen, validated section a stage; `settings` reads a TOML file or a shipped recipe and what the command
line adds; `recipes/` are the shipped ones. A stage is handed its own section; what prepares a run, `run`, `plan` and
the making of servers, sees all of them. This room knows no other, so that a configuration is read and refused in a
moment, before torch is loaded.

May import: nothing.
"""
