#!/bin/bash
# Builds variants of the kernels side by side: build/modfast/NAME.so. No GPU is needed.
#   tools/modfast/build.sh NAME=COMMIT…
set -e
cd "$(git rev-parse --show-toplevel)"
mkdir -p build/modfast
for variant in "$@"; do
  name=${variant%%=*} folder=$(mktemp -d)
  git archive "${variant#*=}" csrc | tar -x -C "$folder"
  shared=SlotShared
  grep -q "struct CommitShared" "$folder/csrc/modulation/kernels.cuh" && shared=CommitShared
  nvcc -shared -O3 -arch=sm_90a --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden \
    -DCOMMIT_SHARED=$shared -I"$folder/csrc" tools/modfast/variant.cu -o "build/modfast/$name.so"
  rm -r "$folder"
  echo "build/modfast/$name.so"
done
