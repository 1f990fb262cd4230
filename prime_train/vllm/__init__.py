"""Rollouts from vLLM servers over HTTP. vLLM itself is never imported: it lives in an environment of its own.

errors     what can be wrong with them
client     requests to a server, repeated where that can help, and what is made of the answers
server     a server process of the run's own, and guard.py, which ends its whole process tree whatever happens
transport  how the policy's weights get to the servers
engine     the `Engine` that the training loop sees, and build.py, which makes it from a configuration
"""
