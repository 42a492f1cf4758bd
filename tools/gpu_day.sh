#!/usr/bin/env bash
# shellcheck disable=SC2317  # the parts are functions that are called by their names
#
# What is run when a GPU is at hand, most important first, in parts of less than ten minutes each.
#
#   tools/gpu_day.sh [-o OUT] [--data_dir FOLDER] [--dry-run] [--cpu] [PART ...]
#
#   smoke     every strategy, on one rank and on several; more workers than ranks, bf16, channels_last, compiled,
#             saving, resuming, exporting: tiny runs that end with exit code 0
#   suite     the tests of GPUs: the protocol against its simulation (over NCCL where there are GPUs enough),
#             bits under --deterministic, peaks of memory against the forecast
#   speed     images/s of the sub-ResNet and the full net: eager, compiled, graphed, beside a bare loop and the
#             card's rate, of preact_resnet101 at 32 pixels
#   speed224  the same of resnetv2_101 at 224 pixels
#   memory    peaks of every strategy beside the prediction, and the deepest net in 20 GiB, measured and predicted
#   demo      tools/demo.py: four sub-ResNets against one net, on handwritten digits
#   bench     what a synchronisation, a checkpoint and the delivery of batches cost; strategies side by side
#   accuracy  preact_resnet101 on CIFAR-10, W = 4 and one net with the batches of all, as many images each and a
#             rate of its own each (tools/study.py); --data_dir names the folder of images, EPOCHS the passes
#             (default: 3). Runs that have ended are lines of OUT/accuracy.jsonl: the same part again makes
#             those that are left. For other code or another GPU take the file away
#
# Without PART: all of them, in this order, but for accuracy where --data_dir is not typed. -o: the folder of
# results (default: runs/gpu_day), a file per part and summary.txt with a line per part. --dry-run prints the
# commands. --cpu is a rehearsal without a GPU, of smoke unless parts are named, and the results say so. PYTHON
# names the interpreter (default: python).
# Exit code: 0, 1 if a step of any part has failed, 2 for what cannot be done (no GPU, say).
set -u

readonly PARTS=(smoke suite speed speed224 memory demo bench accuracy)
readonly PART_SECONDS=570
STEP_SECONDS=300 # unless a step says otherwise
PYTHON=${PYTHON:-python}
out=runs/gpu_day dry='' cpu='' data='' parts=()

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    -o) (($# > 1)) || fail '-o needs a folder'; out=$2; shift ;;
    --data_dir) (($# > 1)) || fail '--data_dir needs a folder'; data=$2; shift ;;
    --dry-run) dry=yes ;;
    --cpu) cpu=yes ;;
    -h | --help) sed -n '4,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"; exit ;;
    *) [[ " ${PARTS[*]} " == *" $1 "* ]] || fail "'$1' is no part: type one of ${PARTS[*]}"; parts+=("$1") ;;
  esac
  shift
done
[[ $out == /* ]] || out=$PWD/$out
[[ -z $data || $data == /* ]] || data=$PWD/$data
if [[ " ${parts[*]} " == *' accuracy '* && -z $data ]]; then
  fail 'accuracy needs --data_dir FOLDER, with train/ and test/ of a folder of images per class'
fi
cd "$(dirname "$0")/.." || exit 2

if ((${#parts[@]} == 0)); then
  if [[ $cpu ]]; then parts=(smoke); elif [[ $data ]]; then parts=("${PARTS[@]}"); else parts=("${PARTS[@]::7}"); fi
fi
if [[ $cpu ]]; then
  export CUDA_VISIBLE_DEVICES=''
  gpus=4 where=' (rehearsal on a CPU)' # gloo carries any number of ranks
elif [[ $dry ]]; then
  gpus=1 where=''
else
  gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "$PYTHON cannot import torch"
  ((gpus > 0)) || fail 'there is no GPU: --dry-run prints what would be run, --cpu rehearses it on this CPU'
  where=''
fi

# ----------------------------------------------------------------------------------------------------------
# The steps of the parts: `step NAME COMMAND...` each.

train() { # RANKS OPTION...: train.py on so many ranks, which share the GPUs there are
  local ranks=$1
  shift
  if ((ranks == 1)); then
    command=("$PYTHON" train.py "$@")
  else
    command=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$ranks" train.py "$@")
  fi
}

fast=(--batch_size 128 --mixed_precision bf16 --channels_last true --workers 4) # as one trains on a GPU

run() { # NAME RANKS OPTION...
  local name=$1 ranks=$2
  shift 2
  train "$ranks" "${tiny[@]}" --output_dir "$folder/$name" "$@"
  step "$name" "${command[@]}"
}

smoke() {
  local strategy ranks tiny folder=$out/smoke last=checkpoints/round-000002
  tiny=(--dataset synthetic --model preact_resnet_small --img_size 32 --batch_size 32 --local_steps 5 --rounds 2)
  tiny+=(--calibration_samples 64 --log_with none --progress false)
  [[ $cpu ]] && tiny+=(--img_size 8 --batch_size 8 --local_steps 2 --cpu_threads 1)
  run resist-1 1 --workers 4
  run resist-2 2 --workers 2
  run resist-4 4 --workers 4
  run more-workers-than-ranks 2 --workers 6 --min_blocks 3
  run bf16-channels_last 1 --workers 2 --mixed_precision bf16 --channels_last true
  run half-way 1 --workers 4 --rounds 1
  train 1 "${tiny[@]}" --output_dir "$folder/half-way" --workers 4 --resume auto --override rounds
  step resume "${command[@]}"
  step verify "$PYTHON" tools/verify.py "$folder/half-way/$last"
  step export "$PYTHON" tools/export.py "$folder/half-way/$last" "$folder/net.safetensors"
  for strategy in local_sgd ddp fsdp zero1 zero2 zero3; do
    run "$strategy-1" 1 --strategy "$strategy"
  done
  run stochastic_depth-1 1 --strategy stochastic_depth --min_blocks 4
  run local_sgd-2 2 --strategy local_sgd --workers 2
  for strategy in ddp fsdp zero1 zero2 zero3; do # NCCL wants a GPU for each rank
    ((gpus >= 2)) && run "$strategy-2" 2 --strategy "$strategy"
    ((gpus >= 4)) && [[ ! $cpu ]] && run "$strategy-4" 4 --strategy "$strategy"
  done
  run adamw-clip-compile 1 --workers 2 --optimizer adamw --lr 0.001 --clip_grad 1 --compile true
  run graphed 1 --workers 2 --compile true --compile_mode reduce-overhead --mixed_precision bf16
  run deterministic 1 --workers 2 --deterministic true
  run data-on-the-host 1 --workers 2 --gpu_cache_mib 0
  run checkpointing-fp16 1 --workers 2 --activation_checkpointing true --mixed_precision fp16
  [[ $cpu ]] || run resnetv2_50 1 --workers 2 --model resnetv2_50 --img_size 224 --mixed_precision bf16
}

suite() {
  STEP_SECONDS=$PART_SECONDS step gpu "$PYTHON" -m pytest -q -m gpu
}

speed() {
  STEP_SECONDS=$PART_SECONDS step cifar "$PYTHON" tools/bench.py --what step --model preact_resnet101 "${fast[@]}" \
    --steps 20 --repeats 5 --output_dir "$out/speed/cifar"
}

speed224() {
  STEP_SECONDS=$PART_SECONDS step imagenet "$PYTHON" tools/bench.py --what step --model resnetv2_101 --img_size 224 \
    "${fast[@]}" --steps 10 --repeats 3 --output_dir "$out/speed224/imagenet"
}

memory() {
  local strategy checkpointing net folder=$out/memory
  net=(--dataset synthetic --model preact_resnet101 --batch_size 128 --local_steps 5 --rounds 2 --eval_every 0)
  net+=(--mixed_precision bf16 --channels_last true --calibration_samples 128 --checkpoint_every 0)
  net+=(--log_with none --progress false)
  step deepest-predicted "$PYTHON" tools/deepest.py --memory 20gib --output_dir "$folder/deepest-predicted"
  step deepest "$PYTHON" tools/deepest.py --memory 20gib --measure --output_dir "$folder/deepest"
  for checkpointing in false true; do
    for strategy in resist local_sgd ddp fsdp zero3; do
      # One rank: a GPU each is what fsdp and zero3 want. Their tensors take no memory format.
      train 1 "${net[@]}" --strategy "$strategy" --activation_checkpointing "$checkpointing" \
        --output_dir "$folder/$strategy-$checkpointing"
      [[ $strategy == resist || $strategy == local_sgd ]] && command+=(--workers 4)
      [[ $strategy == fsdp || $strategy == zero3 ]] && command+=(--channels_last false)
      step "$strategy-$checkpointing" "${command[@]}"
    done
  done
}

demo() {
  step demo "$PYTHON" tools/demo.py
}

bench() {
  step machinery "$PYTHON" tools/bench.py --what local,sync,save --output_dir "$out/bench/machinery"
  local strategies=resist,local_sgd
  ((gpus >= 2)) && strategies+=,ddp # NCCL wants a GPU for each rank
  step strategies "$PYTHON" tools/bench.py --strategies "$strategies" --workers 2 --batch_size 32 \
    --output_dir "$out/bench/strategies"
  step data "$PYTHON" tools/bench.py --what data --workers 4 --batch_size 128 --mixed_precision bf16 \
    --channels_last true --output_dir "$out/bench/data"
  step data-224 "$PYTHON" tools/bench.py --what data --workers 4 --model resnetv2_101 --img_size 224 --batch_size 128 \
    --mixed_precision bf16 --channels_last true --repeats 3 --output_dir "$out/bench/data-224"
}

accuracy() {
  local study=("$PYTHON" tools/study.py --records "$out/accuracy.jsonl")
  STEP_SECONDS=520 step study "${study[@]}" --data_dir "$data" --output_dir "$out/accuracy" --model preact_resnet101 \
    --img_size 32 --batch_size 128 --mixed_precision bf16 --compile true --lr_warmup_steps 100 \
    --arms resist:wire=compact,ddp --rates 0.1,0.2,0.4 --passes "${EPOCHS:-3}" --seeds 0
  step report "${study[@]}" --report
}

# ----------------------------------------------------------------------------------------------------------

step() { # NAME COMMAND...: run it, keep what it says, count how it ended
  local name=$1 code left started=$SECONDS
  shift
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
    return
  fi
  steps=$((steps + 1))
  left=$((PART_SECONDS - SECONDS + began))
  if ((left < 5)); then
    failed+=("$name (no time left)")
    return
  fi
  {
    printf '\n$ '
    printf '%q ' "$@"
    echo
  } >>"$log"
  timeout --kill-after 30 "$((left < STEP_SECONDS ? left : STEP_SECONDS))" "$@" >>"$log" 2>&1
  code=$?
  echo "= $name: exit code $code after $((SECONDS - started)) s" >>"$log"
  ((code == 0)) || failed+=("$name ($code)")
}

play() { # PART: its line for the summary goes to the screen, too
  local began=$SECONDS steps=0 failed=() log=$out/$1.txt verdict=ok line
  rm -rf "${out:?}/${1:?}" # of a day before, whose checkpoints the runs would refuse
  : >"$log"
  "$1"
  ((${#failed[@]} == 0)) || verdict=FAILED
  printf -v line '%-8s %-6s %d of %d steps in %d s%s' "$1" "$verdict" $((steps - ${#failed[@]})) "$steps" \
    $((SECONDS - began)) "$where"
  ((${#failed[@]} == 0)) || line+=": $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
  echo "$line" | tee -a "$out/summary.txt"
  [[ $verdict == ok ]]
}

if [[ $dry ]]; then
  for part in "${parts[@]}"; do
    echo "# $part"
    "$part"
  done
  exit 0
fi
if ! mkdir -p "$out" || ! : >"$out/summary.txt"; then fail "$out cannot be written to"; fi
worst=0
for part in "${parts[@]}"; do
  echo "# $part: $out/$part.txt"
  play "$part" || worst=1
done
echo
cat "$out/summary.txt"
exit "$worst"
