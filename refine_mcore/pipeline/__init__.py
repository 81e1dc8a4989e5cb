"""The step as a pipeline over slices of the sequence.

Planning, without torch: `passes` (what a step consists of), `order` (which pass when),
`instructions` (with its messages), `simulator` (and proof), `drawing`; `plan` is the front.
Running: `engine` (follows a plan), `stage` and `branch_passes` (what a pass does), `cut` (of the
autograd graph), `head` (the objective), `channels` (messages), `slices` (where a text is cut).
"""
