"""What a model can do: accuracy on held-out prompts.

`accuracy` is the evaluation inside a run. It samples as training does and trains nothing.

May import: config, data, models, records, rollout, run, show, verify.
"""
