"""What one round says: the job, the messages, the total, and both halves of each algorithm."""
