# syntax=docker/dockerfile:1
# The image of k8s/rayservice.yaml, for head and workers: docker build --tag REGISTRY/deltazip-ray:0.1.0 .
# Triton needs gcc and FlashInfer nvcc when they first meet a model's shapes: hence the devel image.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/deltazip/bin:$PATH HOME=/home/ray USER=ray PYTHONUNBUFFERED=1
# Links, for KubeRay may start Ray from a login shell, which has a PATH of its own.
RUN python3 -m venv /opt/deltazip \
    && ln -s /opt/deltazip/bin/ray /opt/deltazip/bin/python /opt/deltazip/bin/deltazip /usr/local/bin/ \
    && install --directory --owner=1000 --group=1000 /home/ray

WORKDIR /opt/src
# What the project needs is some GB and changes seldom: a layer of its own.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/home/ray/.cache/pip \
    python -c "import tomllib; it = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*it['dependencies'], *it['optional-dependencies']['gpu'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY deltazip_ray deltazip_ray
COPY kernels kernels
COPY deployments deployments
COPY loadgen loadgen
RUN --mount=type=cache,target=/home/ray/.cache/pip pip install --no-deps --constraint constraints.txt .
COPY --chmod=755 k8s/haproxy /usr/local/bin/haproxy-without-splice

USER 1000:1000
WORKDIR /home/ray
