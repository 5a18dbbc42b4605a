#!/usr/bin/env bash
# The paper's synthetic experiments, and the theorem checked where it can be solved: Figure 1, Figure 2, Table 2, and
# `poc`, with mean-field networks. About ten minutes on two cores.
#
#   scripts/reproduce_figures.sh
#   scripts/reproduce_figures.sh --toy     # smaller sizes, half a minute
#
# OUT: the folder of the results, default runs/mfnn. Started again, it goes on where it was stopped.
set -euo pipefail
quick=
case "${1:-}" in
  "") ;;
  --toy) quick=--quick ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
for experiment in figure1 figure2 table2 poc; do
  poc-lora mfnn "$experiment" $quick --out "${OUT:-runs/mfnn}/$experiment${quick:+-toy}"
done
