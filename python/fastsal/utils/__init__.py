"""Small helpers that know nothing of models or pruning: files, memory, threads, progress."""
