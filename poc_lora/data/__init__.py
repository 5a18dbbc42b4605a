"""Rows on disk to token batches: reading, prompts, order, padding."""
