"""What a model can do: its responses to held-out prompts.

`accuracy` is the evaluation inside a run. It samples as training does and trains nothing.

May import: config, records, rollout.
"""
