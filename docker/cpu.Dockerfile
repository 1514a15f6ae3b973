# yrunner on a processor: docker build -f docker/cpu.Dockerfile -t yrunner:cpu .
# docker run --rm -it -v "$PWD:/work" yrunner:cpu check my.yaml
FROM python:3.11-slim

# A C++ compiler, for train.torch_compile.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/yrunner
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY yrunner yrunner
COPY recipes recipes
COPY deepspeed_configs deepspeed_configs
# torch from its own index, without CUDA's libraries.
RUN pip install --no-cache-dir --constraint constraints.txt torch \
        --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir --constraint constraints.txt '.[board,clusters,gguf,harness,serve]'

# Recipes, rows and outputs are mounted here.
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["yrun"]
CMD ["--help"]
