"""Checks that need hardware CI does not have; run by hand, each prints what it found."""
