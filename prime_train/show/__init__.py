"""What a person sees of a run: figures, the screen, the curves.

`measures` makes a step's figures from the records that its stages left; `metrics` says what each of them is; `view` is
the screen; `report` draws the curves of runs. Stages know nothing of it: they return records, and what is worth a
figure is decided here.

May import: algorithm, models, records, rollout, run.
"""
