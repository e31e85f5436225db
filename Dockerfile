# The toolkit in three images of one file. 'make image' prints the command, and runs it where a docker daemon answers:
#   serve   CPU engines, the gateway, and every command that needs no GPU (the chart's images.toolkit)
#   builder the same inside NVIDIA's image, where trtllm-build is (the chart's images.builder)
# Base images come in as arguments from deploy/images.yaml, where a digest can be pinned. Not built by the project's own
# tests: no docker daemon was at hand.
ARG PYTHON_IMAGE
ARG TRITON_IMAGE

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS packages
COPY --from=wheel /wheels /wheels
# Installed into a folder of its own, so that pip's caches and compilers stay behind.
RUN python -m venv /opt/minitron \
 && /opt/minitron/bin/pip install --no-cache-dir "$(ls /wheels/*.whl)[cpu,otel]"

FROM ${PYTHON_IMAGE} AS serve
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="minitron-trtllm" \
      org.opencontainers.image.description="Minitron-4B on Triton without a GPU, and the OpenAI-compatible gateway" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=packages /opt/minitron /opt/minitron
ENV PATH=/opt/minitron/bin:$PATH PYTHONUNBUFFERED=1
# A number, so that Kubernetes can see that it is not root; nothing below / is written to.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["minitron"]
CMD ["--help"]

FROM ${TRITON_IMAGE} AS builder
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="minitron-trtllm builder" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=wheel /wheels /wheels
# Beside the image's own packages: TensorRT-LLM's versions of numpy and transformers are to stay as they are.
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
 && pip install --no-cache-dir --upgrade-strategy only-if-needed ml-dtypes jinja2 pydantic pyyaml tqdm huggingface-hub
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["minitron"]
CMD ["--help"]
