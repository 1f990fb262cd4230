"""Rollouts from vLLM servers over HTTP. vLLM itself is never imported: it lives in an environment of its own.

errors     what can be wrong with them
client     requests to a server, repeated where that can help, and what is made of the answers
server     a server process of the run's own, and guard.py, which ends its whole process tree whatever happens
weights    what is carried to the servers, and how it is cut into pieces
transport  how it gets there: as files, in a directory of room.py; nccl.py, through libnccl.py; ipc.py
engine     the `Engine` that the training loop sees; leading.py, for several processes, one of which asks the servers
build      makes it from a configuration; probe.py looks whether servers can do what that asks of them
"""
