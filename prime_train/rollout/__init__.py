"""Prompts to verified responses.

`engine` is what the loop asks of a sampler: `sampler` is the embedded one, `vllm/` the one that asks servers. `collect`
samples until the batch is full, `outcomes` has responses verified, `ahead` samples the next batch meanwhile. What is
learned from responses is not known here.

May import: config, data, models, plan, records, run, verify.
"""
