"""Pure tensor mathematics: no files, network, printing, clocks or global state."""
