#!/usr/bin/env bash
# The paper's Table 3: one epoch at several temperatures λ, 0 among them; best adapter, average and merge of each.
#
#   scripts/reproduce_table3.sh CONFIG DATA [key=value ...]
#   scripts/reproduce_table3.sh configs/demo.yaml poc_lora/microworld/data               # minutes, on a CPU
#   EVAL="--protocol generate --beams 4" \
#     scripts/reproduce_table3.sh configs/paper/llama3_8b.yaml ../commonsense 'data.train=[../commonsense]'  # days, on GPUs
#   scripts/reproduce_table3.sh --toy                                                    # half a minute, to see that it runs
#
# As reproduce_table1.sh. TEMPERATURES: default "0 1e-5 1e-4", which are the paper's. OUT: the folder of the runs, default
# runs/table3. The λ = 0 run comes first: the control that the others are compared with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/run_and_score.sh"
if [ "${1:-}" = --toy ]; then
  cd "$here/.."
  set -- $TOY
  EVAL="--limit 5 ${EVAL:-}" TEMPERATURES=${TEMPERATURES:-0 1e-3}
fi
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

config=$1 data=$2 out=${OUT:-runs/table3}
shift 2
temperatures=$(printf '%s\n' ${TEMPERATURES:-0 1e-5 1e-4} | LC_ALL=C sort -g)
if ! awk 'NR == 1 { exit $1 != 0 }' <<< "$temperatures"; then
  echo "$0: TEMPERATURES lacks 0, the control that the others are compared with" >&2
  exit 2
fi
runs=()
for temperature in $temperatures; do
  run=$out/lambda-$temperature
  CONTROL=${runs[0]:-} run_and_score "$config" "$data" "$run" \
    train.epochs=1 train.max_steps=null "optim.temperature=$temperature" "$@"
  runs+=("$run")
done
poc-lora report --compare "${runs[@]}"
python "$here/paper_tables.py" table3 "${runs[@]}"
