"""The noisy AdamW and the learning-rate schedules."""
