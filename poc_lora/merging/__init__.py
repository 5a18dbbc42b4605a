"""Adapters of one base model made one: averages, their errors, and folding one into its base."""
