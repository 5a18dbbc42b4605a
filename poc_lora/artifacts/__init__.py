"""What a run leaves on disk: file names and schemas."""
