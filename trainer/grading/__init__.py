"""Gold answers of the benchmarks, and whether a model's output gives one."""
