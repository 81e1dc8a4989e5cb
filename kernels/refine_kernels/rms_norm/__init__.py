"""RMS norm with a gain and, if wanted, a SiLU gate; keeps nothing but its inputs."""
