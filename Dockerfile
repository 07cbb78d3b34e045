# Two images of one build:
#   docker build --target cpu  -t ringtune:cpu  .
#   docker build --target cuda -t ringtune:cuda .     docker run --gpus all …
# Both: docker run --rm -v "$PWD:/work" -v ringtune-cache:/cache ringtune:cpu sft --model-path … (what follows is ringtune's; ringrun:
# --entrypoint ringrun). The build asks the registries alone: base images, Debian's packages, crates.io.

FROM rust:1.95-bookworm AS build
# cmake and g++ build the SentencePiece library. Without MPI: ranks of containers exchange over sockets and NCCL.
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ make pkg-config && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked && strip target/release/ringtune target/release/ringrun

FROM debian:bookworm-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/ringtune /src/target/release/ringrun /usr/local/bin/
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/ringtune/
ENV RINGTUNE_CACHE=/cache/ringtune HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["ringtune"]
CMD ["--help"]

# The runtime image has NVRTC and NCCL, which are loaded when they are first needed; the driver comes with --gpus.
FROM nvidia/cuda:12.9.1-runtime-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/ringtune /src/target/release/ringrun /usr/local/bin/
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/ringtune/
ENV RINGTUNE_CACHE=/cache/ringtune HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["ringtune"]
CMD ["--help"]
