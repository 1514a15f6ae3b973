"""Measurements that the docs cite; README.md lists them."""
