"""The machine around: progress on a terminal, files that are written whole or not at all, Ctrl-C."""
