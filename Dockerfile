# For machines with NVIDIA GPUs. Untested: the project's own checks run on CPU.
#   docker build -t refine-mcore . && docker run --gpus all --shm-size 8g -it refine-mcore
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

WORKDIR /opt/refine-mcore
COPY . .
# The image's own torch stays: its pin is left out of the constraints, any torch satisfies the rest.
RUN grep -v '^torch==' constraints.txt > constraints-image.txt \
    && pip install --no-cache-dir -c constraints-image.txt -e '.[gpu]'

# One connection keeps Megatron's collectives and kernels in the order they were issued.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1
