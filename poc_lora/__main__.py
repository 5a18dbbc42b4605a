"""`python -m poc_lora`, which is what `accelerate launch -m poc_lora` runs."""

from poc_lora.cli import main

if __name__ == "__main__":
    main()
