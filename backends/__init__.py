"""Backends: a folder each, found by its name; `portable` has kernel bodies that several use."""
