"""Pure tensor mathematics: no files, clocks, printing or global state."""
