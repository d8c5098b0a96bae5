"""Many clients on one machine: scenarios, partitions, engines, baselines and reports."""
