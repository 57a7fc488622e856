"""How one expert lies in memory, quantised or not."""
