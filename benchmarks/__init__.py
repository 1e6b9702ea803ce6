"""Measurements that anyone can run again: `./run bench NAME`."""
