"""What happened, for good: entry*, reconcile*, replicate* decide; store (the SQL) and writer (its one owner) act."""
