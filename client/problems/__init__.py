"""Problem sets: files and data sets, read as questions with ids, in order."""
