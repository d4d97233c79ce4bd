"""Kernel bodies that more than one backend registers; no constant of a device in here."""
