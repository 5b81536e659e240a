"""What lies on disk or on the Hub: files, pickles, checkpoints, conversion, runs, downloads."""
