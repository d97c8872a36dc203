"""The trainer's commands, a file each: they check options, call the rooms below and print results."""
