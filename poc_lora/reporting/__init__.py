"""Results for reading: tables for the terminal and Markdown. The self-contained HTML page goes here, as html.py."""
