"""How one question is put to a model and its answer read: label, generate and harness."""
