"""Who computes what: devices, ranks, workers, forks and processes, and who ends whom."""
