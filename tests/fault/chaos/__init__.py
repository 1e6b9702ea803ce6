"""Breaks a whole box at random, and checks afterwards that no job was lost or doubled."""
