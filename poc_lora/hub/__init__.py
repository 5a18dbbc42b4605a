"""Uploading an adapter to the Hugging Face Hub: what is uploaded, its card, and the commit."""
