"""Short depthwise causal convolution with a carried tail of inputs."""
