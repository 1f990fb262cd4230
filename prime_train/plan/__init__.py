"""Will it fit, and how long will it take: per-rank memory and time of a step, before any weight is loaded.

`make.make_plan` is the plan as records, `command` prints it. `activations` counts what micro-batches hold, `memory`
puts the worst moments of stages together, `durations` divides work by rates; `sizes`, `flops` and `hardware` are what
both rest on. A plan is made from configurations alone, ours and the models': it samples nothing and trains nothing.

May import: config, data, models, records, run.
"""
