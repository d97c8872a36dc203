"""Problem sets: rows of files and data sets, as questions with ids in an order."""
