#!/usr/bin/env bash
# The paper's synthetic experiments with mean-field networks, Figure 1, Figure 2 and Table 2, what it does not state swept,
# pruning, and the theorem checked where it can be solved. About a quarter of an hour on one core.
#
#   scripts/reproduce_figures.sh
#   scripts/reproduce_figures.sh --toy     # smaller sizes, about two minutes
#
# OUT: the folder of the results, default runs/mfnn. Started again, it goes on where it was stopped.
set -euo pipefail
quick=
case "${1:-}" in
  "") ;;
  --toy) quick=--quick ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
for experiment in figure1 figure2 table2 sweep pruning poc; do
  poc-lora mfnn "$experiment" $quick --out "${OUT:-runs/mfnn}/$experiment${quick:+-toy}"
done
poc-lora mfnn figure2 --long $quick --out "${OUT:-runs/mfnn}/figure2_long${quick:+-toy}"
