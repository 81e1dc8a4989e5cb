"""The parts a ReFINE step is made of, whichever way it runs: whole texts (`training`) or slices
(`pipeline`)."""
