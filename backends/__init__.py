"""Backends: a folder each, found by its name; `portable` holds kernel bodies that several register.
"""
