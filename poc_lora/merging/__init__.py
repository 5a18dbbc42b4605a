"""Merges adapters of one base model into one, reports what that loses, and folds an adapter into its base."""
