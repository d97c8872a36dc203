"""Commands as processes: forks of one that has imported their libraries, so that a start takes no seconds."""
