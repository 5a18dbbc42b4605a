"""The theory's experiments. Each module has `run(folder, settings)`, which computes, draws and writes."""
