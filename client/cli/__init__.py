"""The client's commands, a file for each kind, and the habits that the three programs' command lines share."""
