"""Block-diagonal empirical Fisher statistics: accumulate, store, merge, collect."""
