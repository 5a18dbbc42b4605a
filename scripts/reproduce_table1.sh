#!/usr/bin/env bash
# The paper's Table 1: eight adapters trained for three epochs, the best of them, their average and their merge on the
# eight benchmarks.
#
#   scripts/reproduce_table1.sh CONFIG DATA [key=value ...]
#   scripts/reproduce_table1.sh configs/demo.yaml poc_lora/microworld/data               # minutes, on a CPU
#   LAUNCH="accelerate launch --num_processes 8 -m poc_lora" EVAL="--protocol generate --beams 4" \
#     scripts/reproduce_table1.sh configs/paper/llama3_8b.yaml ../commonsense 'data.train=[../commonsense]'  # days, on GPUs
#   scripts/reproduce_table1.sh --toy                                                    # half a minute, to see that it runs
#
# CONFIG: a run's YAML, such as those of configs/paper. DATA: the benchmarks' folder (scripts/download_commonsense.py builds
# it). OUT: where the run goes, default runs/table1. Started again, it goes on where it was stopped. The paper's rows are
# printed beside the run's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/run_and_score.sh"
if [ "${1:-}" = --toy ]; then
  cd "$here/.."
  set -- $TOY
  EVAL="--limit 5 ${EVAL:-}"
fi
[ $# -ge 2 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }

config=$1 data=$2 out=${OUT:-runs/table1}
shift 2
run_and_score "$config" "$data" "$out" train.epochs=3 train.max_steps=null "$@"
poc-lora report "$out"
python "$here/paper_tables.py" table1 "$out"
