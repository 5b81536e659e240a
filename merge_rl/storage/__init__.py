"""All that touches the disk or the network."""
