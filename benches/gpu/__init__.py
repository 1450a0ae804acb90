"""Time, memory and results of fastsal on a GPU: `python -m benches.gpu [--smoke] [--out FILE]`."""
