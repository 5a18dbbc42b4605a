"""One adapter on disk, in PEFT's format, read as untrusted; where adapters come from."""
