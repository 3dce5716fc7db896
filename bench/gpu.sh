#!/bin/bash
# Everything that has to be measured on one GPU, in one call of less than ten minutes, without a network:
#
#     bash bench/gpu_wheels.sh                 # once, where there is a network: packages into .gpu/wheels (ignored by git)
#     OUT=results bash bench/gpu.sh            # on the GPU machine, in the root of the repository, .gpu carried along
#
# The machine has Python 3.12 with torch 2.11 or later (PYTHON names it). Each step has a limit of its own and may fail without
# the others; what is left of SECONDS_IN_ALL ends the call. $OUT then has steps.tsv (step, exit code, seconds), log.txt,
# speed.jsonl (a line for each recipe and library), and the comparison's results.json and report.html.
#
# GPU_SH_TINY=1 runs the same steps in tiny sizes on any device, GPU_SH_DRY=1 prints their commands.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
TINY=${GPU_SH_TINY:-}
DRY=${GPU_SH_DRY:-}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SECONDS=0
export PYTHONPATH="$PWD/src:$WORK/packages" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR="$WORK/inductor"

# Runs a command within so many seconds, or in what is left.
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ -n "$DRY" ]; then
    echo "$*"
    return
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    printf '%s\tleft out\t0\n' "$name" >>"$OUT/steps.tsv"
    return
  fi
  echo "=== $name: $*" >>"$OUT/log.txt"
  timeout "$limit" "$@" >>"$OUT/log.txt" 2>&1
  code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) | tee -a "$OUT/steps.tsv"
}

vlp() { # NAME LIMIT WORDS...
  local name=$1 limit=$2
  shift 2
  if [ -n "$DRY" ]; then echo "vlp $*"; else step "$name" "$limit" "$PYTHON" -m fastvlp "$@"; fi
}

installed() { [ -n "$DRY" ] || "$PYTHON" -c "import $1" 2>/dev/null; }

if [ -d .gpu/wheels ] && [ -z "$DRY" ]; then
  step packages 90 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$WORK/packages" .gpu/wheels/*.whl
fi
peers=()
installed transformers && peers+=(transformers)
installed open_clip && peers+=(open_clip)
beside=()
[ ${#peers[@]} -gt 0 ] && beside=(--beside "${peers[@]}")

if [ -n "$TINY" ]; then
  device=cpu budget=2s batch_b32=2 batch_b16=2 batch_flm=2 repetitions=1 vocab=300 scenes=24
  b32=clip_small b16=clip_small flm=tiny precision=fp32
  largest=(--largest-batch --memory-gb 0.3)
else
  device=cuda budget=25s batch_b32=1024 batch_b16=256 batch_flm=64 repetitions=20 vocab=49408 scenes=4000
  b32=clip_b32 b16=clip_b16 flm=flm_base precision=bf16
  largest=(--largest-batch)
fi
rows=(--made-data --repetitions "$repetitions" --out "$OUT/speed.jsonl")
fields=(device=$device vocab=$vocab precision=$precision)
towers=(clip_photos "${rows[@]}")
language=("${rows[@]}" --model $flm --set "${fields[@]}" data.batch_size=$batch_flm)

step nvidia-smi 10 nvidia-smi
step parity 100 env FASTVLP_TEST_DEVICE=$device "$PYTHON" -m pytest -q -p no:cacheprovider --timeout=90 tests/parity

# Towers, masked and beside the peers: MFU at least 50 % (B/16), masking at 95 % of its ceiling, 1.3 times as fast as open_clip.
vlp b32 75 bench "${towers[@]}" --model $b32 --set "${fields[@]}" data.batch_size=$batch_b32 --vary keep=1,0.5,0.25 "${beside[@]}"
vlp b16 75 bench "${towers[@]}" --model $b16 --set "${fields[@]}" data.batch_size=$batch_b16 --vary keep=1,0.5,0.25 "${beside[@]}"

# FLM and its rivals at 288 px: its step within 1.15 times its FLOPs beside MLM.
vlp flm 90 bench mlm_photos flm_photos ar_photos cappa_photos "${language[@]}"

# Each option has the losses of the run without it: `loss_difference` in speed.jsonl.
vlp recompute 60 bench flm_photos "${language[@]}" --vary recompute=false,true
if [ -n "$TINY" ]; then
  # A CPU compiles for minutes.
  echo "compile is left out where GPU_SH_TINY is set" >>"$OUT/log.txt"
else
  vlp compile-b16 90 bench "${towers[@]}" --model $b16 --set "${fields[@]}" data.batch_size=$batch_b16 --vary compile=false,true
  vlp compile-flm 90 bench flm_photos "${language[@]}" --vary compile=false,true
fi
vlp muon 45 bench flm_photos "${language[@]}" --vary optim.matrices=adamw,muon
vlp largest 60 bench "${towers[@]}" --model $b16 --set "${fields[@]}" data.batch_size=$batch_b16 "${largest[@]}"

# A short comparison at equal time on the GPU.
vlp scenes 60 data demo --out "$WORK/world" --train $scenes --val 24 --test 24 --pairs 0 --singles 0
vlp compare 150 compare mlm_demo flm_demo cappa_demo --budget $budget --slice 1s --marks 1 --tuned-marks 1 --probe-steps 20 \
  --out "$WORK/comparison" --set device=$device precision=$precision data.train="$WORK/world/train" data.val="$WORK/world/val"
if [ -z "$DRY" ]; then
  for kind in json html; do
    cp "$WORK"/comparison/{results,report}.$kind "$OUT/" 2>/dev/null
  done
  # Nothing about the machine's folders.
  [ -f "$OUT/speed.jsonl" ] && sed -i "s#$OUT/##g; s#$WORK/##g" "$OUT/speed.jsonl"
  cat "$OUT/steps.tsv"
fi
exit 0
