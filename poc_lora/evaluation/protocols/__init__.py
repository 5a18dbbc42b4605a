"""How a question is put to a model and its answer is read: label, generate and harness."""
