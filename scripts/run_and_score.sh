# Sourced by the reproduce scripts. run_and_score CONFIG DATA RUN [key=value ...]: train, merge, evaluate; what is done
# already is not done again. LAUNCH: what starts the processes. EVAL: more options of poc-lora eval.
run_and_score() {
  local config=$1 data=$2 run=$3
  local launch=${LAUNCH:-poc-lora}
  shift 3
  if [ -e "$run/config.yaml" ]; then
    $launch train "$run/config.yaml" --resume
  else
    $launch train "$config" "output=$run" "$@"
  fi
  [ -d "$run/merged" ] || poc-lora merge "$run" --out "$run/merged"
  $launch eval "$run" --data "$data" ${EVAL:-}
}

# What --toy stands for: the demo's base model and benchmarks, two adapters and a few steps. Called from the checkout.
TOY="configs/demo.yaml poc_lora/microworld/data adapters.count=2 train.epochs=null train.max_steps=3 optim.warmup_steps=1"
