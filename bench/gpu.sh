#!/bin/bash
# Everything that has to be measured on one GPU, in one call of less than ten minutes, without a network:
#
#     bash bench/gpu_wheels.sh                 # once, where there is a network: packages into .gpu/wheels (ignored by git)
#     OUT=results bash bench/gpu.sh            # on the GPU machine, in the root of the repository, .gpu carried along
#
# The machine has Python 3.12 with torch 2.11 or later (PYTHON names it). Each part has a limit of its own and may fail without
# the others; what is left of SECONDS_IN_ALL ends the call, so that the parts that say most come first. $OUT has, from each part as
# it ends, steps.tsv (part, exit code, seconds), log.txt, speed.jsonl (a line for each recipe and library), released.jsonl,
# losses.jsonl and comparison/ with results.json and report.html.
#
# GPU_SH_TINY=1 runs the same parts in tiny sizes on any device, GPU_SH_DRY=1 prints their commands.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
PYTHON=${PYTHON:-python3}
TINY=${GPU_SH_TINY:-}
DRY=${GPU_SH_DRY:-}
WORK=$(mktemp -d)
# A CPU in tiny sizes may be busy with other work.
if [ -n "$TINY" ]; then slower=20; else slower=1; fi
SECONDS_IN_ALL=${SECONDS_IN_ALL:-$((570 * slower))}
SECONDS=0
trap 'rm -rf "$WORK"' EXIT
[ -f .gpu/commit ] && export FASTVLP_COMMIT=${FASTVLP_COMMIT:-$(cat .gpu/commit)}
export PYTHONPATH="$PWD/src:$WORK/packages" PYTHONUNBUFFERED=1 COLUMNS=200 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR="$WORK/inductor"

# Runs a command within so many seconds, or in what is left, and returns its exit code.
step() { # NAME LIMIT COMMAND...
  local name=$1 limit=$(($2 * slower)) began=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ -n "$DRY" ]; then
    echo "$*"
    return
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    printf '%s\tleft out\t0\n' "$name" | tee -a "$OUT/steps.tsv"
    return 124
  fi
  # Printed apart, since the scenes are drawn beside the other parts.
  echo "=== $name: $*" >"$WORK/$name.txt"
  timeout -k 5 "$limit" "$@" >>"$WORK/$name.txt" 2>&1
  code=$?
  # Nothing about the machine's folders.
  local folders="s#$OUT/##g; s#$WORK/##g; s#$PWD/##g"
  sed "$folders" "$WORK/$name.txt" >>"$OUT/log.txt"
  [ "$name" = scenes ] || sed -i "$folders" "$OUT"/*.jsonl 2>/dev/null
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) | tee -a "$OUT/steps.tsv"
  return "$code"
}

vlp() { # NAME LIMIT WORDS...
  local name=$1 limit=$2
  shift 2
  if [ -n "$DRY" ]; then echo "vlp $*"; else step "$name" "$limit" "$PYTHON" -m fastvlp "$@"; fi
}

installed() { [ -n "$DRY" ] || "$PYTHON" -c "import $1" 2>/dev/null; }

if [ -d .gpu/wheels ] && [ -z "$DRY" ]; then
  step packages 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/packages" .gpu/wheels/*.whl
fi
peers=()
installed transformers && peers+=(transformers)
installed open_clip && peers+=(open_clip)
beside=()
[ ${#peers[@]} -gt 0 ] && beside=(--beside "${peers[@]}")

if [ -n "$TINY" ]; then
  device=cpu precision=fp32 repetitions=1 vocab=300 b32=clip_small b16=clip_small flm=tiny
  batch_b32=2 batch_b16=2 batch_flm=2 pairs=(data.batch_size=2 accumulate=2) largest=(--largest-batch --memory-gb 0.3)
  released=(--size tiny --layers 1 --image 16 --vocab 90 --batch 2) losses=(--steps 2)
  scenes=24 budget=2s batch_compare=4
  # A CPU compiles for minutes, and its parity is what the other tests check.
  compiled=() parity=(tests/parity/test_contrastive_parity.py)
else
  device=cuda precision=bf16 repetitions=20 vocab=49408 b32=clip_b32 b16=clip_b16 flm=flm_base
  batch_b32=1024 batch_b16=256 batch_flm=64 pairs=(data.batch_size=512 accumulate=64) largest=(--largest-batch --memory-gb 80)
  released=(--size base --vocab 50265 --batch 64) losses=(--steps 200 --compile)
  scenes=15000 budget=20s batch_compare=256
  compiled=(compile=true) parity=(tests/parity)
fi
rows=(--made-data --repetitions "$repetitions" --out "$OUT/speed.jsonl")
once=(--made-data --repetitions 1 --batches 1 --out "$OUT/speed.jsonl")
fields=(device=$device vocab=$vocab precision=$precision)

# Towers of a size, beside other libraries; without these where they fail.
towers() { # NAME SIZE ROWS
  local words=(bench clip_photos "${rows[@]}" --model "$2" --set "${fields[@]}" data.batch_size="$3")
  words+=(--vary keep=1,0.5,0.25 group_texts=true "${compiled[@]}")
  vlp "$1" 75 "${words[@]}" "${beside[@]}"
  local code=$?
  case $code in 0 | 124 | 137) ;; *) vlp "$1-alone" 60 "${words[@]}" ;; esac
}

language=("${rows[@]}" --model $flm --set "${fields[@]}" data.batch_size=$batch_flm)

step nvidia-smi 10 nvidia-smi
# Drawn on the CPU beside the parts that use the GPU.
vlp scenes 400 data demo --out "$WORK/world" --level easy --train $scenes --val 256 --test 24 --pairs 0 --singles 0 &
scenes_job=$!
[ -n "$DRY" ] && wait

# Towers: MFU at least 50 % (B/16), masking at 95 % of its ceiling, 1.3 times as fast as open_clip.
towers b16 $b16 $batch_b16
towers b32 $b32 $batch_b32

# FLM and its rivals at 288 px: its step within 1.15 times its FLOPs beside MLM, and three times as fast as in the released layout.
vlp flm 80 bench mlm_photos flm_photos ar_photos prefixlm_photos cappa_photos "${language[@]}"
step released 60 "$PYTHON" bench/objective_step_time.py "${released[@]}" --device $device --precision $precision --no-memory \
  --repetitions "$repetitions" --arms flm mlm flm_plain flm_plain_fused_attention --out "$OUT/released.jsonl"

# The same step compiled, with less memory, and by Muon.
vlp options 90 bench flm_photos "${language[@]}" --vary compile=false "${compiled[@]}" recompute=true optim.matrices=muon

# Each option has the losses of the run without it.
step losses 100 "$PYTHON" bench/same_losses_options.py "${losses[@]}" --device $device --out "$OUT/losses.jsonl"

# 32,768 pairs, contrasted exactly: `memory_bytes` is below 80 GB.
vlp pairs 75 bench clip_photos "${once[@]}" --model $b16 --set "${fields[@]}" keep=0.5 "${pairs[@]}"

# FLM against MLM and CapPa at equal time on the GPU.
[ -z "$DRY" ] && wait "$scenes_job"
vlp compare 140 compare mlm_photos flm_photos cappa_photos --budget $budget --slice 2s --marks 0.25 0.5 1 --scores cloze \
  --out "$OUT/comparison" --set device=$device precision=$precision data.batch_size=$batch_compare data.workers=2 vocab=500 \
  model.image.size=64 data.train="$WORK/world/train" data.val="$WORK/world/val"
# Weights are not wanted.
[ -z "$DRY" ] && find "$OUT/comparison" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} + 2>/dev/null

# The most rows of a micro-batch in 80 GB; and whether this device's kernels give the numbers of published code.
vlp largest 40 bench clip_photos "${once[@]}" --model $b16 --set "${fields[@]}" data.batch_size=$batch_b16 "${largest[@]}"
step parity 60 env FASTVLP_TEST_DEVICE=$device "$PYTHON" -m pytest -q -p no:cacheprovider --timeout=55 "${parity[@]}"

exit 0
