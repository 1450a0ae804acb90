"""General helpers, independent of models and pruning: files, memory, threads, progress."""
