# yrunner on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t yrunner:cuda .
# docker run --rm -it --gpus all --ipc=host -v "$PWD:/work" yrunner:cuda train my.yaml
# --ipc=host: processes of one run share memory.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

# The compilers build Triton's and DeepSpeed's kernels at the first use.
RUN apt-get update && apt-get install --yes --no-install-recommends \
        g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/yrunner
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY yrunner yrunner
COPY recipes recipes
COPY deepspeed_configs deepspeed_configs
RUN pip install --no-cache-dir --constraint constraints.txt \
        '.[board,clusters,deepspeed,gguf,harness,qlora,serve]'

WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["yrun"]
CMD ["--help"]
