"""Will it fit, and how long will it take: per-rank memory and time of a step, before any weight is loaded.

`make.make_plan` is the plan as records, `command` prints it. `activations` counts what micro-batches hold, `memory`
puts the worst moments of stages together, `durations` divides work by rates.
"""

from .make import make_plan
from .rates import Rates, rates_of
from .records import Change, Cluster, Duration, Item, Plan, Stage, Unplannable

__all__ = ["Change", "Cluster", "Duration", "Item", "Plan", "Rates", "Stage", "Unplannable", "make_plan", "rates_of"]
