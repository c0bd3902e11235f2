"""Graphs while they are read: drafts of nodes, and the rules that make one operator of many, for every door."""
