"""PRIME itself: what is computed of a batch of verified responses, and what is learned from it.

In the order of a step: `scoring` (log-probs of policy and reference), `mismatch` (the sampler's against the trainer's),
`prm` (implicit rewards, and the PRM's own update), `advantages`, `policy` (the PPO update). Each is a function on
records, and on its own section of the configuration where it has one. Where responses come from, and where figures go,
is not known here.

May import: config, models, records.
"""
