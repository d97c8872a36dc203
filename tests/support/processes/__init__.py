"""Starts commands as forks of a process that has imported their libraries, so that a start takes no seconds."""
