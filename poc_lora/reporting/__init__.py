"""Results for reading: tables for the terminal and Markdown, figures, and the self-contained HTML page."""
