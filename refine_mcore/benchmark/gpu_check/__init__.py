"""What only a GPU can show, in one command (`make gpu-check`): do the operations, the models and
the step give there what they give on a CPU, where does the host wait, what does a step cost.

`run.py` goes through the sections, one module each; `jobs.py` alone knows how a training step is
built and run.
"""
