#!/usr/bin/env bash
# Everything that is measured and checked on an accelerator, in under ten minutes, with nothing to download.
#   bash benchmarks/gpu.sh [OUT]        one machine with JAX for its accelerator, `pip install "jax[cuda13]"` for a GPU
#   TOY=1 bash benchmarks/gpu.sh        the same code anywhere, with sizes that say nothing about speed
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/accelerator}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
$python -m benchmarks.accelerator ${TOY:+--toy} | tee "$out/accelerator.jsonl"
small=${TOY:+--config.sft.steps=3 --config.steps=2 --config.eval.prompts=16}
$python train.py --config configs/operators.py --config.eval.every=100 $small --workdir "$out/operators" | tail -n 3
