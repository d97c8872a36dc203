"""Reports: one HTML page about a RUN, with charts, and comparisons of several RUNs."""
