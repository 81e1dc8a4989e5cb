"""Write strengths and log decays of the delta rules, from the projections they are made of."""
