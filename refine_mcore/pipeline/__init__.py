"""The step as a pipeline over slices of the sequence: its plan as data (`plan`) and what
runs it (`engine`)."""
