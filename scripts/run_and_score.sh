# Sourced by the reproduce scripts. run_and_score CONFIG DATA RUN [key=value ...]: train, merge, evaluate; what is done
# already is not done again. LAUNCH: what starts the processes. EVAL: more options of poc-lora eval. CONTROL: the run
# whose merge this one's is compared with, if any.
run_and_score() {
  local config=$1 data=$2 run=$3
  local launch=${LAUNCH:-poc-lora} resume=
  shift 3
  # With the same settings again: train names those that have changed since, in place of going on with the old ones.
  if [ -e "$run/config.yaml" ]; then resume=--resume; fi
  $launch train "$config" "output=$run" "$@" $resume
  [ -d "$run/merged" ] || poc-lora merge "$run" --out "$run/merged"
  $launch eval "$run" --data "$data" ${CONTROL:+--control "$CONTROL"} ${EVAL:-}
}

# What --toy stands for: the demo's base model and benchmarks, two adapters and a few steps. Called from the checkout.
TOY="configs/demo.yaml poc_lora/microworld/data adapters.count=2 train.epochs=null train.max_steps=3 optim.warmup_steps=1"
