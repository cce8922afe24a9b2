#!/usr/bin/env bash
# Builds, tests, sanitises and measures reasonkern on a machine with a GPU and without a network.
#
#   benchmarks/gpu.sh {build,test,sanitize,bench}… [--out DIR] [--wheels DIR]
#
# A call takes the stages in the order named, stops after at most LIMIT seconds (default: 530) and
# goes on where it was when called again with the same DIR (default: gpu-out); take a new DIR for a
# new commit. A failing step stops nothing. Exit status: 0 all steps of the stages are done and good,
# 1 all done and something failed, 3 more to do: call again. Logs and verdicts are
# DIR/STAGE/STEP.{log,ok,failed,refused}.
#
# Needs: torch >= 2.11 with CUDA, its nvcc, ninja, setuptools, triton 3.6.
# Wanted for tests and peers, from --wheels where they are not installed yet:
WANTED="numpy<2.4 pytest pytest-xdist hypothesis expecttest matplotlib tqdm trl==1.16.0 liger-kernel==0.8.5"
set -u

cd "$(dirname "$0")/.." || exit 1
OUT=gpu-out WHEELS="" STAGES=()
usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
}
while [ $# -gt 0 ]; do
  case $1 in
    build | test | sanitize | bench) STAGES+=("$1") ;;
    --out | --wheels)
      if [ $# -lt 2 ]; then usage; fi
      if [ "$1" = --out ]; then OUT=$2; else WHEELS=$2; fi
      shift
      ;;
    *) echo "gpu.sh: unexpected $1" >&2 && exit 2 ;;
  esac
  shift
done
if [ ${#STAGES[@]} = 0 ]; then usage; fi
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530}
LATER=0 FAILED=0
NO_TESTS=5 # pytest's exit status when -k leaves nothing

left() { echo $((LIMIT - SECONDS)); }

# step NAME COMMAND…: runs once, within the time that is left; the verdict is a file.
step() {
  local name=$1 log=$DIR/$1.log
  shift
  if [ -e "$DIR/$name.ok" ] || [ -e "$DIR/$name.failed" ] || [ -e "$DIR/$name.refused" ]; then
    return 0
  fi
  if [ "$(left)" -lt 1 ] || [ "$(left)" -lt "${LEAST:-20}" ]; then # timeout 0 is no limit
    LATER=1
    return 0
  fi
  echo "== $STAGE/$name: $*"
  timeout -s INT -k 10 "$(left)" "$@" >"$log" 2>&1
  verdict "$name" $?
}

verdict() {
  local name=$1 status=$2 log=$DIR/$1.log
  tail -n 4 "$log"
  if [ "$status" = 0 ] || { [ "$STAGE" = test ] && [ "$status" = "$NO_TESTS" ]; }; then
    echo "$status" >"$DIR/$name.ok"
  elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
    out_of_time "$name"
  elif [ -n "${REFUSAL:-}" ] && grep -qiE "$REFUSAL" "$log"; then
    grep -iE "$REFUSAL" "$log" | head -n 1 >"$DIR/$name.refused"
    echo "refused: $(cat "$DIR/$name.refused")"
  else
    echo "$status" >"$DIR/$name.failed"
    echo "FAILED with status $status; see $log"
  fi
}

# A step may have started late: it gets a second chance, with a whole call's time.
out_of_time() {
  if [ -e "$DIR/$1.once" ]; then
    echo "out of time twice" >"$DIR/$1.failed"
  else
    touch "$DIR/$1.once"
    LATER=1
  fi
}

build() {
  if [ -n "$WHEELS" ]; then
    for wheel in $WANTED; do
      step "wheel-${wheel%%[<=]*}" "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$wheel"
    done
  fi
  REASONKERN_CUDA=1 step install "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
  step info "$PYTHON" -m reasonkern info
  step smoke-cuda "$PYTHON" -m benchmarks.smoke cuda
  step smoke-triton "$PYTHON" -m benchmarks.smoke triton
}

# Only what touches the GPU: CPU, interpreter and simulator cases run in CI without one. A process
# that lost its CUDA context ends; pytest-xdist, where it is there, starts another one.
tests() {
  local workers=()
  if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} step gpu "$PYTHON" -m pytest tests "${workers[@]}" \
    -k "(cuda or triton or gpu) and not sim and not compile" \
    --gpu-record "$DIR/tests.json" -p no:cacheprovider -rf
  echo "commit $DIR/tests.json as benchmarks/results/<machine>/<date>-<commit>-tests.json"
}

sanitize() {
  local tool small
  # A virtualised or locked-down driver refuses the debugger interface; that is no finding.
  local REFUSAL="not supported|insufficient permission|unable to (find|initialize|attach)|no such file"
  REFUSAL="$REFUSAL|failed to (initialize|connect|run)|internal sanitizer error|not found"
  for tool in memcheck racecheck; do
    # racecheck takes minutes on a row of 152k.
    small=()
    if [ "$tool" = racecheck ]; then small=(--vocab 7 1021 20000); fi
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.smoke cuda "${small[@]}"
  done
}

bench() {
  local result=$DIR/results.json
  "$PYTHON" -m benchmarks --list --device cuda >"$DIR/cases.txt"
  # Cases that are in the file already are skipped, so an interrupted run only repeats one case.
  rm -f "$DIR/all-cases.once"
  step all-cases "$PYTHON" -m benchmarks --device cuda --json "$result" --resume
  if [ -e "$DIR/all-cases.ok" ]; then
    step gates "$PYTHON" -m benchmarks --device cuda --json "$result" --resume --check
    step picture "$PYTHON" -m benchmarks.plot "$result" "$DIR/results.png"
    echo "commit $result as benchmarks/results/<machine>/<date>-<commit>.json"
  fi
}

for STAGE in "${STAGES[@]}"; do
  DIR=$OUT/$STAGE
  mkdir -p "$DIR"
  if [ "$STAGE" = test ]; then tests; else "$STAGE"; fi
  echo "-- $STAGE:" "$(find "$DIR" -name '*.ok' | wc -l) ok," \
    "$(find "$DIR" -name '*.failed' | wc -l) failed," \
    "$(find "$DIR" -name '*.refused' | wc -l) refused"
  if compgen -G "$DIR/*.failed" >/dev/null; then FAILED=1; fi
done
if [ "$LATER" = 1 ]; then exit 3; fi
exit "$FAILED"
