# For machines with NVIDIA GPUs. Untested: the project's own checks run on CPU.
#   docker build -t refine-mcore . && docker run --gpus all --shm-size 8g -it refine-mcore
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

WORKDIR /opt/refine-mcore
COPY . .
# The image's own torch stays, and the Triton that it needs: their pins are left out of the
# constraints, any torch satisfies the rest.
RUN grep -vE '^(torch|triton)==' constraints.txt > constraints-image.txt \
    && pip install --no-cache-dir -c constraints-image.txt -e '.[gpu]'

# As many hardware queues as there can be: a pipeline's receives wait in queues of their own.
ENV CUDA_DEVICE_MAX_CONNECTIONS=32
