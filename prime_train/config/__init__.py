"""Every key of a run, and how a configuration is read.

`keys` has one frozen, validated section a stage; `settings` reads a TOML file or a shipped recipe and what the command
line adds; `recipes/` are the shipped ones. Every room may import this one, and hands a stage its own section alone. It
knows no other room, so that a configuration is read and refused in a moment, before torch is loaded.

May import: nothing.
"""
