"""grading: see the files."""
