#!/bin/bash
# The packages that bench/gpu.sh carries to a machine without a network, for Python 3.12 on Linux x86-64, into .gpu/wheels: all that
# fastvlp, its parity tests and the peers import, but torch, numpy and CUDA, which are there. About 50 MB. And the commit, which a
# copy of the checkout without git could not tell.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
mkdir -p .gpu/wheels
"$PYTHON" -m pip download --quiet --dest .gpu/wheels --no-deps --only-binary=:all: --python-version 3.12 \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 -c constraints.txt \
  tyro docstring-parser typing-extensions typeguard cattrs attrs tokenizers safetensors fsspec simplejpeg pillow rich \
  markdown-it-py mdurl pygments matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six packaging \
  pytest pytest-timeout pluggy iniconfig hypothesis sortedcontainers \
  transformers huggingface-hub regex pyyaml filelock tqdm httpx httpcore h11 anyio idna certifi sniffio shellingham typer click \
  httpx2 httpcore2 truststore annotated-doc open-clip-torch ftfy wcwidth
git rev-parse --short HEAD >.gpu/commit
du -sh .gpu/wheels
